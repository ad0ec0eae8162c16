"""The encoders of a synthetic checkpoint: their config and the moments of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemma_edge.export.model.gemma3n.gemma3n_audio_tensors import PER_DIM_SCALE, audio_specs
from gemma_edge.export.model.gemma3n.gemma3n_vision_tensors import TOWER, vision_specs
from gemma_edge.export.model.gemma3n.modality_embedder import TABLE
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_vision_config import ARCHITECTURE, VisionConfig

Json = dict[str, Any]
TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")  # names below `model.`

# The tiny model's: all blocks of the published encoder, 20 times narrower, and 16 tokens an image of 64 x 64.
TINY_VISION: Json = {"channel_multiplier": 0.05, "msfa_output_resolution": 4}
TINY_IMAGE_SIZE, TINY_IMAGE_TOKENS = 64, 16
# Two of twelve layers, 24 times narrower. Frames and tokens are as published: they follow from the sound.
TINY_AUDIO: Json = {"conf_num_hidden_layers": 2, "hidden_size": 64, "sscp_conv_channel_size": [16, 8]}


def vision_json(tiny: bool, vocab_offset: int, vocab_size: int) -> Json:
    """The `vision_config` of config.json."""
    return {
        "architecture": ARCHITECTURE,
        "do_pooling": False,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "label_names": ["LABEL_0", "LABEL_1"],
        "model_args": TINY_VISION if tiny else None,
        "model_type": "gemma3n_vision",
        "num_classes": 2,
        "rms_norm_eps": 1e-06,
        "vocab_offset": vocab_offset,
        "vocab_size": vocab_size,
    }


def audio_json(tiny: bool, vocab_offset: int, vocab_size: int) -> Json:
    """The `audio_config` of config.json."""
    published: Json = {
        "conf_attention_chunk_size": 12,
        "conf_attention_context_left": 13,
        "conf_attention_context_right": 0,
        "conf_attention_logit_cap": 50.0,
        "conf_conv_kernel_size": 5,
        "conf_num_attention_heads": 8,
        "conf_num_hidden_layers": 12,
        "conf_positional_bias_size": 256,
        "conf_reduction_factor": 4,
        "conf_residual_weight": 0.5,
        "gradient_clipping": 10000000000.0,
        "hidden_size": 1536,
        "input_feat_size": 128,
        "model_type": "gemma3n_audio",
        "rms_norm_eps": 1e-06,
        "sscp_conv_channel_size": [128, 32],
        "sscp_conv_group_norm_eps": 0.001,
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        "vocab_offset": vocab_offset,
        "vocab_size": vocab_size,
    }
    return published | TINY_AUDIO if tiny else published


def preprocessor_json(tiny: bool) -> Json:
    """preprocessor_config.json, for images and audio, as published for google/gemma-3n-E2B-it."""
    size = TINY_IMAGE_SIZE if tiny else 768
    return {
        "dither": 0.0,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "feature_size": 128,
        "fft_length": 1024,
        "fft_overdrive": True,
        "frame_length": 512,
        "hop_length": 160,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessorFast",
        "image_seq_length": TINY_IMAGE_TOKENS if tiny else 256,
        "image_std": [0.5, 0.5, 0.5],
        "input_scale_factor": 1.0,
        "max_frequency": 7600.0,
        "mel_floor": 1e-05,
        "min_frequency": 125.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "per_bin_mean": None,
        "per_bin_stddev": None,
        "preemphasis": 0.97,
        "preemphasis_htk_flavor": True,
        "processor_class": "Gemma3nProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "return_attention_mask": False,
        "sampling_rate": 16000,
        "size": {"height": size, "width": size},
    }


def tower_moments(config: Json, preprocessor: Json) -> Iterator[tuple[TensorSpec, float, float]]:
    """Every tensor of the encoders that a multimodal config.json describes, with its mean and deviation."""
    for spec in vision_specs(VisionConfig.from_dict(config, preprocessor=preprocessor)).values():
        yield spec, *vision_moments(spec)
    for spec in audio_specs(AudioConfig.from_dict(config)).values():
        yield spec, *audio_moments(spec)


def vision_moments(spec: TensorSpec) -> tuple[float, float]:
    """Moments that keep every activation near unit size, so that every block matters."""
    if spec.name.endswith("layer_scale.gamma"):
        return 0.3, 0.03
    if spec.name.endswith(".bias"):
        return 0.0, 0.1
    if spec.name.endswith(TABLE):
        return 0.0, 1.0
    if len(spec.shape) == 1:
        return 1.0, 0.1
    fan_in = spec.size // spec.shape[0]
    # Queries twice as large give attention that is neither flat nor a choice of one.
    gain = 2.0 if spec.name.startswith(TOWER) and spec.name.endswith("query.proj.weight") else 1.0
    return 0.0, float(gain * fan_in**-0.5)


def audio_moments(spec: TensorSpec) -> tuple[float, float]:
    """As `vision_moments`."""
    if spec.name.endswith(PER_DIM_SCALE):
        return 0.0, 0.3
    if spec.name.endswith(TABLE):
        return 0.0, 1.0
    if len(spec.shape) == 1:
        return 1.0, 0.1
    return 0.0, float((spec.size // spec.shape[0]) ** -0.5)
