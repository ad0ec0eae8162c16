"""Small random audio encoders: weights in a dictionary, and the same weights in `transformers`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.onnx.onnx_audio import emit_audio
from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights
from gemma_edge.export.model.gemma3n.gemma3n_audio_tensors import EMBEDDER, TOWER, audio_specs
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import SMALL as SMALL_TEXT

Array = NDArray[np.float32]
Json = dict[str, Any]

SOFT_TOKENS, TEXT_HIDDEN = 12, 24
# Chunks shorter than a window, a softcap that bends, and no two sizes alike.
SMALL: Json = {
    "vocab_size": 8,
    "vocab_offset": 100,
    "input_feat_size": 16,
    "hidden_size": 32,
    "conf_attention_chunk_size": 4,
    "conf_attention_context_left": 6,
    "conf_attention_logit_cap": 3.0,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 2,
    "sscp_conv_channel_size": [10, 6],
}

# What any audio config may ask for, each as changes of SMALL.
VARIANTS: dict[str, Json] = {
    "as_it_is": {},
    "sees_the_future": {"conf_attention_context_right": 2},
    "sees_only_itself": {"conf_attention_context_left": 1},
    "no_context": {"conf_attention_context_left": 0},
    "chunk_longer_than_the_window": {"conf_attention_chunk_size": 9, "conf_attention_context_left": 3},
    "chunk_of_one": {"conf_attention_chunk_size": 1},
    "no_reduction": {"conf_reduction_factor": 1},
    "other_strides": {
        "sscp_conv_stride_size": [[4, 2], [3, 1]],
        "sscp_conv_kernel_size": [[5, 3], [2, 4]],
        "conf_reduction_factor": 2,
    },
    "clipped": {"gradient_clipping": 0.5},
    "other_numbers": {
        "conf_conv_kernel_size": 3,
        "conf_residual_weight": 0.25,
        "sscp_conv_group_norm_eps": 0.5,
    },
}


@dataclass
class AudioSource:
    """A `WeightSource` over arrays."""

    audio: AudioConfig
    weights: Mapping[str, Array]
    config: Gemma3nConfig

    def read(self, name: str) -> Array:
        return self.weights[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.weights[name][start:stop]


def audio_config(**changes: Any) -> AudioConfig:
    """SMALL with `changes`."""
    text = {"hidden_size": TEXT_HIDDEN}
    return AudioConfig.from_dict(
        {
            "audio_config": SMALL | changes,
            "text_config": text,
            "audio_soft_tokens_per_image": SOFT_TOKENS,
        }
    )


def random_source(config: AudioConfig, seed: int = 0) -> AudioSource:
    """Weights that keep activations near unit size."""
    weights = {name: _draw(spec, seed) for name, spec in audio_specs(config).items()}
    return AudioSource(config, weights, Gemma3nConfig.from_dict(SMALL_TEXT))


def _draw(spec: TensorSpec, seed: int) -> Array:
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    values = rng.standard_normal(spec.shape, dtype=np.float32)
    if len(spec.shape) == 1:
        mean = 0.0 if spec.name.endswith("per_dim_scale") else 1.0
        return np.float32(0.3) * values + np.float32(mean)
    return values * np.float32(np.prod(spec.shape[1:]) ** -0.5)


def random_features(config: AudioConfig, frames: int, seed: int = 0) -> Array:
    """(frames, bins), in the range of log-mel."""
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((frames, config.input_feat_size), dtype=np.float32) - np.float32(4)


def first(count: int, frames: int) -> NDArray[np.bool_]:
    """A mask: the first `count` of `frames` frames."""
    return np.arange(frames) < count


def write_audio(source: AudioSource, folder: Path, recipe: str = "fp32") -> Path:
    """audio.onnx and its data in `folder`."""
    emitted = emit_audio(source.audio, load_recipe(recipe))
    with open(folder / "audio.onnx.data", "wb") as file:
        emitted.data.write(file, FoldedWeights(source, source.audio), NearestRounding("none"))
    path = folder / "audio.onnx"
    path.write_bytes(emitted.model.SerializeToString())
    return path


# The same model in transformers. -------------------------------------------------------------------


class TransformersAudio:
    """The tower and the embedder of `source` in `transformers`, in eval mode."""

    def __init__(self, source: AudioSource, threads: int = 1) -> None:
        import torch
        from transformers import Gemma3nAudioConfig, Gemma3nAudioEncoder, Gemma3nTextConfig
        from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

        torch.set_num_threads(threads)  # in a small model threads only wait for each other
        self.audio = source.audio
        config = Gemma3nAudioConfig(**self.audio.to_dict()["audio_config"])
        text = Gemma3nTextConfig(hidden_size=self.audio.text_hidden_size)
        self.tower: Any = Gemma3nAudioEncoder(config).eval()
        self.embedder: Any = Gemma3nMultimodalEmbedder(config, text).eval()
        for module, prefix in ((self.tower, TOWER), (self.embedder, EMBEDDER)):
            names = [name for name in source.weights if name.startswith(prefix)]
            state = {n.removeprefix(prefix): torch.from_numpy(source.weights[n]) for n in names}
            module.load_state_dict(state, strict=True)

    def soft_tokens(self, features: Array, mask: NDArray[np.bool_]) -> Array:
        """What `Gemma3nModel.forward` puts in the place of audio tokens: (soft_tokens, text hidden)."""
        import torch

        last_id = self.audio.vocab_offset + self.audio.vocab_size - 1
        with torch.no_grad():
            out = self.tower(torch.from_numpy(features)[None], ~torch.from_numpy(mask)[None])
            rows = self.embedder(inputs_embeds=out.last_hidden_state)
            padding = self.embedder(input_ids=torch.tensor([[last_id]]))
            rows = torch.where(out.audio_mel_mask[..., None], padding, rows)
            missing = padding.expand(1, self.audio.soft_tokens - rows.shape[1], rows.shape[2])
            soft: Array = torch.cat([rows, missing], dim=1)[0].numpy()
        return soft

    def hard_tokens(self) -> Array:
        """(vocab_size, text hidden)."""
        import torch

        ids = torch.arange(self.audio.vocab_size) + self.audio.vocab_offset
        with torch.no_grad():
            hard: Array = self.embedder(input_ids=ids).numpy()
        return hard
