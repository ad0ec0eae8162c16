"""A small model with both encoders, a talk about pictures and a recording, and transformers' answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.modalities import AudioModality
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from support.margins import recorded

ANSWER_TOKENS = 32
Json = dict[str, Any]


def write_checkpoint(folder: Path) -> Path:
    """The tiny synthetic checkpoint with its encoders: 16 tokens an image of 64 x 64, 188 a clip."""
    return synthesize(folder, encoders=True, progress=False).path


def picture(seed: int) -> NDArray[np.uint8]:
    """u8 (48, 70, 3): smooth, and no two alike."""
    y, x = np.mgrid[:48, :70]
    waves = [np.sin(x / (5 + seed + c) + seed) + np.cos(y / (7 + seed) + c) for c in range(3)]
    return np.uint8(np.clip(64 * np.stack(waves, axis=-1) + 128, 0, 255))


def recording(seconds: float = 12.3) -> NDArray[np.float32]:
    """f32 (n,) at 16 kHz: a voice-like sweep of tones."""
    time = np.arange(int(16_000 * seconds)) / 16_000
    loud = 0.3 * (1 + np.sin(2 * np.pi * 3 * time))
    return np.float32(loud * np.sin(2 * np.pi * (180 + 60 * np.sin(5 * time)) * time))


def text(words: str) -> Json:
    return {"type": "text", "text": words}


FIRST: list[Json] = [
    {
        "role": "user",
        "content": [
            text("Listen to this:"),
            {"type": "audio", "audio": recording()},
            text("and look\n"),
            {"type": "image", "image": picture(0)},
            text("What is it?"),
        ],
    }
]
SECOND: list[Json] = [
    *FIRST,
    {"role": "assistant", "content": [text("A wave.")]},
    {"role": "user", "content": [{"type": "image", "image": picture(1)}, text("And this?")]},
]


def continued(first: Prompt, answer: Sequence[int], second: Prompt) -> Prompt:
    """`first`, the very tokens of its answer, and what `second` has after its last turn of the model."""
    placed = [item for item in second.placed if item.start >= len(first.ids)]
    tail = placed[0].start - 3  # at least the begin of the image and the empty line before it
    shift = len(first.ids) + len(answer) - tail
    moved = [type(p)(p.start + shift, p.stop + shift, p.attachment) for p in placed]
    return Prompt([*first.ids, *answer, *second.ids[tail:]], (*first.placed, *moved))


def transformers_model(checkpoint: Path) -> Any:
    """Gemma3nForConditionalGeneration of a checkpoint, fp32. Needs timm."""
    import torch
    from transformers import Gemma3nForConditionalGeneration, GenerationConfig

    torch.set_num_threads(1)  # so small that threads only wait for each other
    model = Gemma3nForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=ANSWER_TOKENS)
    return model


def transformers_answer(theirs: Any, ours: Model, prompt: Prompt) -> tuple[list[int], list[float]]:
    """For a prompt of ours: transformers' greedy tokens, and the logits (vocab,) of the first of them."""
    import torch

    images = [p.attachment.data for p in prompt.placed if p.attachment.kind == "image"]
    clips = [p.attachment.data for p in prompt.placed if p.attachment.kind == "audio"]
    audio = ours.reader.modalities["audio"]
    inputs: Json = {"input_ids": torch.tensor([prompt.ids])}
    if images:
        inputs["pixel_values"] = torch.from_numpy(np.stack(images) * np.float32(1 / 255))
    if clips and isinstance(audio, AudioModality):
        (clip,) = clips  # several would be padded to the longest
        features, mask = audio.log_mel(clip)
        inputs["input_features"] = torch.from_numpy(features)[None]
        inputs["input_features_mask"] = torch.from_numpy(mask)[None]
    with torch.no_grad():
        answer = theirs.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    return answer.sequences[0, len(prompt.ids) :].tolist(), answer.logits[0][0].tolist()


def our_logits(model: Model, prompt: Prompt) -> NDArray[np.float32]:
    """Those of the first token of the answer, (vocab,), with an empty cache before."""
    model.reset()
    with recorded(model) as seen:
        list(model.stream_tokens(prompt, max_tokens=1))
    return seen[-1]
