"""Pocket in torch: initial weights, the forward pass over packed rows, and the losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import IGNORED, Batch, masks
from layout import AUDIO, AUDIO_TOKENS, END_OF_AUDIO, END_OF_IMAGE, IMAGE, IMAGE_GRID
from numpy.typing import NDArray
from pictures import COLOURS, KINDS, Scene
from speech import COMMANDS, DIGITS
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Gemma3nForConditionalGeneration

from gemma_edge.export.synth.synth_gemma3n import BRANCH_NORMS

WORDS = sorted(
    {word for said in (*DIGITS["en"], *DIGITS["es"], *COMMANDS, *COMMANDS.values()) for word in said.split()}
)
WORD_IDS = {word: index for index, word in enumerate(WORDS, 1)}  # 0 is the blank


def new_model(folder: Path, seed: int) -> Any:
    """Pocket with random weights, from the side files in `folder`."""
    torch.manual_seed(seed)
    model: Any = Gemma3nForConditionalGeneration(AutoConfig.from_pretrained(folder))
    text = model.config.text_config
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if weight.dim() == 4 or (weight.dim() == 2 and name.startswith("audio_tower.")):
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(text.head_dim**-0.25)  # attention has no scale: scores begin at a deviation of 1
            elif name.endswith(BRANCH_NORMS):
                weight.fill_(0.4)
            elif name.endswith("correct_output_scale"):
                weight.fill_(1.0)  # at 0, as transformers has it, no per-layer embedding would be seen
            elif name.endswith("modality_router.weight"):
                # Its input is divided by hidden_size.
                nn.init.normal_(weight, std=math.sqrt(text.hidden_size) / 2)
            elif weight.dim() == 2 and "embed_tokens" not in name:
                nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
    return model


class Helpers(nn.Module):
    """Linear layers that only training has: they ask the encoders for what is to be seen and heard.

    Of an image: from each soft token its place, from those of a quarter which colour and kind is there; of a
    clip: its words by connectionist temporal classification. Without them it takes many times as long until
    the decoder's own loss teaches the encoders anything.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.colour = nn.Linear(hidden, len(COLOURS) + 1)
        self.kind = nn.Linear(hidden, len(KINDS) + 1)
        self.words = nn.Linear(hidden, len(WORDS) + 1)
        self.place = nn.Linear(hidden, IMAGE_GRID**2)
        # How often each answer is right anyway: learning that first makes all soft tokens alike, for long.
        for layer, rest in ((self.colour, 3 / 8), (self.kind, 3 / 8), (self.words, 0.8)):
            share = (1 - rest) / (layer.out_features - 1)
            nn.init.constant_(layer.bias, math.log(share))
            nn.init.constant_(layer.bias[:1], math.log(rest))

    def image_loss(self, soft: Tensor, scenes: list[Scene]) -> tuple[Tensor, float]:
        """Of (images, tokens, hidden); also the share of quarters that are right."""
        grid, half = IMAGE_GRID, IMAGE_GRID // 2
        quarters = soft.view(-1, 2, half, 2, half, soft.shape[-1]).mean(dim=(2, 4)).flatten(1, 2)
        colours, kinds = (
            torch.zeros(len(scenes), 4, dtype=torch.long),
            torch.zeros(len(scenes), 4, dtype=torch.long),
        )
        for i, scene in enumerate(scenes):
            for shape in scene.shapes:
                colours[i, shape.place] = list(COLOURS).index(shape.colour) + 1
                kinds[i, shape.place] = KINDS.index(shape.kind) + 1
        assert grid % 2 == 0
        of_colour, of_kind = self.colour(quarters), self.kind(quarters)
        loss = functional.cross_entropy(of_colour.flatten(0, 1), colours.flatten())
        loss = loss + functional.cross_entropy(of_kind.flatten(0, 1), kinds.flatten())
        places = torch.arange(grid**2).repeat(len(scenes))
        loss = loss + functional.cross_entropy(self.place(soft).flatten(0, 1), places)
        right = (of_colour.argmax(-1) == colours) & (of_kind.argmax(-1) == kinds)
        return loss, float(right.float().mean())

    def speech_loss(self, soft: Tensor, lengths: Tensor, said: list[str]) -> tuple[Tensor, float]:
        """Of (clips, tokens, hidden), `lengths` of them heard; also the share of clips that are right."""
        words = [[WORD_IDS[word] for word in phrase.split()] for phrase in said]
        scores = functional.log_softmax(self.words(soft), dim=-1)
        loss = functional.ctc_loss(
            scores.transpose(0, 1),
            torch.tensor([word for phrase in words for word in phrase]),
            lengths,
            torch.tensor([len(phrase) for phrase in words]),
            zero_infinity=True,
        )
        right = 0
        for best, length, phrase in zip(scores.argmax(-1).tolist(), lengths.tolist(), words, strict=True):
            path = [word for i, word in enumerate(best[:length]) if word and (i == 0 or best[i - 1] != word)]
            right += path == phrase
        return loss, right / len(words)


def see(model: Any, scenes: list[Scene]) -> Tensor:
    """Soft tokens (images, tokens, hidden)."""
    pixels = np.stack([np.asarray(scene.draw(), np.float32) for scene in scenes]) / np.float32(255)
    soft: Tensor = model.model.get_image_features(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    ).pooler_output
    return soft


def hear(model: Any, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Soft tokens (clips, AUDIO_TOKENS, hidden), and how many of them each clip's sound gave.

    Args:
        features, mask: (clips, frames, mel bins) and (clips, frames), True where there is sound.
    """
    out = model.model.get_audio_features(features, ~mask)
    soft, missing = out.pooler_output, out.audio_mel_mask
    padding = model.model.embed_audio(input_ids=torch.tensor([[model.config.text_config.vocab_size - 1]]))
    soft = torch.where(missing[..., None], padding, soft)
    extra = padding.expand(len(soft), AUDIO_TOKENS - soft.shape[1], -1)
    return torch.cat([soft, extra], dim=1), (~missing).sum(dim=1)


def decoder(model: Any, compiled: bool) -> Any:
    """The text model as a function of embeddings, per-layer rows, masks and positions."""

    def run(
        embeddings: Tensor, per_layer: Tensor, full: Tensor, sliding: Tensor, positions: Tensor
    ) -> Tensor:
        hidden: Tensor = model.model.language_model(
            inputs_embeds=embeddings,
            per_layer_inputs=per_layer,
            attention_mask={"full_attention": full, "sliding_attention": sliding},
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return hidden

    return torch.compile(run, dynamic=False) if compiled else run


def answer_logits(model: Any, run: Any, batch: Batch, soft: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) where a token of the model's own follows, and those tokens (n,).

    Args:
        soft: the soft tokens of the media of `batch`, in their order.
    """
    ids, labels = torch.from_numpy(batch.ids), torch.from_numpy(batch.labels)
    text = model.model.language_model
    embeddings = text.embed_tokens(ids)
    if soft is not None:
        for embedder, end in (
            (model.model.embed_vision, END_OF_IMAGE),
            (model.model.embed_audio, END_OF_AUDIO),
        ):
            last = embedder(input_ids=torch.tensor([[end]]))
            embeddings = torch.where((ids == end)[..., None], last, embeddings)
        embeddings = embeddings.masked_scatter(((ids == IMAGE) | (ids == AUDIO))[..., None], soft)
    seen: dict[str, NDArray[np.bool_]] = masks(batch.segments)
    full, sliding = (torch.from_numpy(seen[kind]) for kind in ("full_attention", "sliding_attention"))
    hidden = run(embeddings, text.get_per_layer_inputs(ids), full, sliding, torch.from_numpy(batch.positions))
    wanted = labels != IGNORED
    cap = model.config.text_config.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden[wanted]) / cap) * cap, labels[wanted]


def answer_weights(labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Of each learned label in (rows, ROW): 1 / sqrt(tokens of its answer), or stories would drown sums."""
    learned = np.pad(labels != IGNORED, ((0, 0), (1, 1))).astype(np.int8)
    edges = np.diff(learned).ravel()
    lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    return np.repeat(lengths.astype(np.float32) ** -0.5, lengths)


def answer_loss(model: Any, run: Any, batch: Batch, soft: Tensor | None) -> tuple[Tensor, float]:
    """Cross entropy of the model's own tokens, by `answer_weights`; also the share of them that are right."""
    logits, labels = answer_logits(model, run, batch, soft)
    weights = torch.from_numpy(answer_weights(batch.labels) * batch.weights[batch.labels != IGNORED])
    loss = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    return loss, float((logits.argmax(-1) == labels).float().mean())
