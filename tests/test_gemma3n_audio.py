"""The audio encoder: reference and ONNX graph against transformers, live and through golden outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_audio import OnnxAudioOps, emit_audio
from gemma_edge.export.emit.onnx.onnx_graph import FLOAT, value_info
from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights, token_table
from gemma_edge.export.emit.reference.reference_audio import ReferenceAudioOps, evaluate_audio
from gemma_edge.export.model.gemma3n import gemma3n_audio as audio
from gemma_edge.export.model.gemma3n.gemma3n_audio_tensors import audio_specs, folded_specs
from gemma_edge.export.model.ops import Weights
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.errors import BundleError, ConfigError, UsageError
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.log_mel import LogMel, log_mel
from gemma_edge.runtime.media.audio_encoder import AudioEncoder
from support.audio_clips import odd_clips
from support.random_gemma3n_audio import (
    SMALL,
    SOFT_TOKENS,
    TEXT_HIDDEN,
    VARIANTS,
    Array,
    AudioSource,
    TransformersAudio,
    audio_config,
    first,
    random_features,
    random_source,
    write_audio,
)
from support.random_gemma3n_text import SMALL as SMALL_TEXT

GOLDEN = Path(__file__).parent / "golden" / "audio.npz"
TOLERANCE = 1e-4  # of the largest value; the bar is 1e-3
Block = Callable[[Any, AudioConfig, Any, Any], Any]

BLOCKS: dict[str, Block] = {
    "cumulative_norm": lambda o, c, x, valid: o.cumulative_norm(
        x, Weights("audio_tower.subsample_conv_projection.")["conv_0.norm"], c.sscp_conv_group_norm_eps
    ),
    "subsample": lambda o, c, x, valid: audio.subsample(o, c, x),
    "feed_forward": lambda o, c, x, valid: audio.feed_forward(o, c, below(0, "ffw_layer_start."), x),
    "attention": lambda o, c, x, valid: audio.attention(o, c, below(0, "attention."), x, valid),
    "light_convolution": lambda o, c, x, valid: audio.light_convolution(o, c, below(0, "lconv1d."), x),
    "conformer_block": lambda o, c, x, valid: audio.conformer_block(o, c, below(1), x, valid),
}
MAPS = {"cumulative_norm", "subsample"}  # their input is (time, frequency, channels)


def below(layer: int, name: str = "") -> Weights:
    return Weights(f"audio_tower.conformer.{layer}.{name}")


def difference(got: Any, expected: Any) -> float:
    """The largest, relative to the largest value."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def source(golden: dict[str, Any]) -> AudioSource:
    assert json.loads(str(golden["config"])) == SMALL
    weights = {n.removeprefix("weight."): a for n, a in golden.items() if n.startswith("weight.")}
    return AudioSource(audio_config(), weights, Gemma3nConfig.from_dict(SMALL_TEXT))


def run_reference(source: AudioSource, name: str, x: Array, valid: Array, folder: Path) -> Array:
    ops = ReferenceAudioOps(FoldedWeights(source, source.audio), source.audio)
    return np.asarray(BLOCKS[name](ops, source.audio, x, valid))


def run_onnx(source: AudioSource, name: str, x: Array, valid: Array, folder: Path) -> Array:
    """Emits the block's graph alone and runs it. Feature maps have their channels first there."""
    data = ExternalData("block.data", folded_specs(source.audio))
    ops = OnnxAudioOps(source.audio, load_recipe("fp32"), data)
    x = (x.transpose(2, 0, 1) if name in MAPS else x)[None]
    edges = (ops.input("x", FLOAT, list(x.shape)), ops.input("valid", FLOAT, [1, *valid.shape]))
    BLOCKS[name](ops, source.audio, *edges)
    ops.nodes[-1].output[0] = "y"
    ops.outputs.append(value_info("y", FLOAT, [None] * x.ndim))  # type: ignore[list-item]
    model = ops.model("block")
    used = {edge for node in ops.nodes for edge in node.input}
    for value in [v for v in model.graph.input if v.name not in used]:
        model.graph.input.remove(value)
    with open(folder / "block.data", "wb") as file:
        data.write(file, FoldedWeights(source, source.audio), NearestRounding("none"))
    (folder / "block.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "block.onnx", providers=["CPUExecutionProvider"])
    inputs = {"x": x, "valid": valid[None]}
    y = np.asarray(session.run(None, {v.name: inputs[v.name] for v in session.get_inputs()})[0][0])
    return y.transpose(1, 2, 0) if name == "cumulative_norm" else y


# Against transformers. ----------------------------------------------------------------------------


@pytest.mark.parametrize("run", [run_reference, run_onnx])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(
    name: str,
    run: Callable[..., Array],
    source: AudioSource,
    golden: dict[str, Any],
    tmp_path: Path,
) -> None:
    x = golden[f"{name}.in"]
    x = x[:, :, None] if name == "subsample" else x
    valid = golden["mask"][:: source.audio.time_stride, None].astype(np.float32)
    assert difference(run(source, name, x, valid, tmp_path), golden[f"{name}.out"]) <= TOLERANCE


def test_golden_soft_and_hard_tokens(source: AudioSource, golden: dict[str, Any], tmp_path: Path) -> None:
    expected = golden["soft_tokens"]
    got = evaluate_audio(source, source.audio, golden["features"], golden["mask"])
    assert difference(got, expected) <= TOLERANCE
    with AudioEncoder(write_audio(source, tmp_path), threads=1) as encoder:
        assert difference(encoder.encode(golden["features"], golden["mask"]), expected) <= TOLERANCE
    assert difference(token_table(source, source.audio), golden["hard_tokens"]) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_live(name: str, tmp_path: Path) -> None:
    """Whatever the config asks for, whatever the clip's length: transformers, reference and graph agree."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = audio_config(**VARIANTS[name])
    source = random_source(config)
    theirs = TransformersAudio(source)
    longest = min(config.max_frames, 192)
    with AudioEncoder(write_audio(source, tmp_path), threads=1) as encoder:
        for frames, valid in [(1, 1), (17, 17), (longest - 1, longest - 1), (longest, longest // 3)]:
            frames = min(frames, longest)
            features, mask = random_features(config, frames), first(valid, frames)
            expected = theirs.soft_tokens(features, mask)
            got = evaluate_audio(source, config, features, mask)
            assert difference(got, expected) <= TOLERANCE
            assert difference(encoder.encode(features, mask), got) <= TOLERANCE
    assert difference(token_table(source, config), theirs.hard_tokens()) <= TOLERANCE


def test_tensors_are_those_of_a_true_size_checkpoint() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

    with torch.device("meta"):
        published = transformers.Gemma3nAudioConfig()
        tower = transformers.Gemma3nAudioEncoder(published)
        embed = Gemma3nMultimodalEmbedder(published, transformers.Gemma3nTextConfig(hidden_size=2048))
    theirs = {
        prefix + name: tuple(tensor.shape)
        for prefix, module in (("audio_tower.", tower), ("embed_audio.", embed))
        for name, tensor in module.state_dict().items()
    }
    data = json.loads(published.to_json_string(use_diff=False))
    config = AudioConfig.from_dict({"audio_config": data, "text_config": {"hidden_size": 2048}})
    assert {name: spec.shape for name, spec in audio_specs(config).items()} == theirs
    assert config == AudioConfig.from_dict({"audio_config": {}, "text_config": {}})


def test_one_true_size_layer(tmp_path: Path) -> None:
    """A conformer layer of the published width over 30 s; everything but the number of layers is true."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    shapes = {"audio_config": {"conf_num_hidden_layers": 1}, "text_config": {"hidden_size": 32}}
    config = AudioConfig.from_dict(shapes)
    source = random_source(config)
    features, mask = random_features(config, 2997), first(2960, 2997)
    expected = TransformersAudio(source, threads=2).soft_tokens(features, mask)
    assert expected.shape == (188, 32)
    assert difference(evaluate_audio(source, config, features, mask), expected) <= TOLERANCE
    with AudioEncoder(write_audio(source, tmp_path), threads=2) as encoder:
        assert difference(encoder.encode(features, mask), expected) <= TOLERANCE


def test_a_synthetic_checkpoint_holds_it(tmp_path: Path) -> None:
    made = synthesize(tmp_path / "tiny", encoders=True, progress=False).path
    documents = [json.loads((made / f"{name}config.json").read_text()) for name in ("", "preprocessor_")]
    config = AudioConfig.from_dict(documents[0])
    assert LogMel.from_dict(documents[1]) == LogMel() and config.input_feat_size == LogMel().feature_size
    stored = load_file(made / "model.safetensors")
    weights = {name: stored[f"model.{name}"].astype(np.float32) for name in audio_specs(config)}
    shapes = {name: array.shape for name, array in weights.items()}
    assert shapes == {name: spec.shape for name, spec in audio_specs(config).items()}
    source = AudioSource(config, weights, Gemma3nConfig.from_dict(SMALL_TEXT))
    soft = evaluate_audio(source, config, *log_mel(odd_clips()["speech_like"]))
    assert soft.shape == (188, 128) and np.isfinite(soft).all()
    heard = soft[: config.tokens(LogMel().frames(24_000))]
    assert np.abs(np.diff(heard, axis=0)).max() > 0.1  # rows differ: the sound matters
    np.testing.assert_array_equal(np.diff(soft[len(heard) :], axis=0), 0)


# Facts that are easy to get wrong. ------------------------------------------------------------------


def test_padding_is_the_last_audio_id(source: AudioSource) -> None:
    features = random_features(source.audio, 40)
    soft = evaluate_audio(source, source.audio, features, first(20, 40))
    padding = token_table(source, source.audio)[-1]
    # Tokens begin at frames 0, 16 and 32; the clip ends before the last of them.
    assert [bool(np.allclose(row, padding)) for row in soft] == [False, False] + [True] * (SOFT_TOKENS - 2)


def test_the_mask_keeps_padding_out_but_for_the_reach_of_the_convolutions(source: AudioSource) -> None:
    """The last token begins at frame 32 and sees seven frames: what comes later changes nothing."""
    features = random_features(source.audio, 64)
    changed = features.copy()
    changed[39:] += 5
    mask = first(34, 64)
    a, b = (evaluate_audio(source, source.audio, x, mask) for x in (features, changed))
    np.testing.assert_allclose(a, b, atol=1e-6)
    changed[38] += 5
    assert difference(evaluate_audio(source, source.audio, changed, mask), a) > 1e-3


def test_tokens_of_thirty_seconds() -> None:
    config = AudioConfig.from_dict({"audio_config": {}, "text_config": {}})
    assert config.tokens(2997) == 188 == config.soft_tokens
    assert config.max_frames == 3008 and config.frames_per_token == 16


def test_what_is_folded_is_not_shipped(source: AudioSource) -> None:
    emitted = emit_audio(source.audio, load_recipe("fp32"))
    names = {tensor.name for tensor in emitted.data.initializers}
    assert names == set(folded_specs(source.audio))
    assert not [name for name in names if "pos_proj" in name or "per_dim_scale" in name]


def test_linear_layers_are_quantized_and_convolutions_are_not(tmp_path: Path) -> None:
    config = audio_config(hidden_size=128, input_feat_size=32)
    source = random_source(config)
    features = random_features(config, 150)
    expected = evaluate_audio(source, config, features)
    emitted = emit_audio(config, load_recipe("int4"))
    kinds = {node.op_type for node in emitted.model.graph.node}
    assert "MatMulNBits" in kinds and "FusedMatMul" not in kinds
    convolved = {node.input[1] for node in emitted.model.graph.node if node.op_type == "Conv"}
    types = {tensor.name: tensor.data_type for tensor in emitted.model.graph.initializer}
    assert {types[name] for name in convolved} == {FLOAT}
    with AudioEncoder(write_audio(source, tmp_path, "int4"), threads=1) as encoder:
        got = encoder.encode(features)
    cosine = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99


# The encoder's own errors. --------------------------------------------------------------------------


def test_clips_that_do_not_fit(source: AudioSource, tmp_path: Path) -> None:
    with AudioEncoder(write_audio(source, tmp_path), threads=1) as encoder:
        assert (encoder.soft_tokens, encoder.hidden_size, encoder.bins) == (SOFT_TOKENS, TEXT_HIDDEN, 16)
        assert encoder.max_frames == 192
        for frames in (0, 193):
            with pytest.raises(UsageError, match=f"1 to 192 frames of 10 ms, not {frames}"):
                encoder.encode(random_features(source.audio, frames))
        with pytest.raises(ValueError, match=r"\(frames, 16\)"):
            encoder.encode(np.zeros((5, 17), np.float32))
        with pytest.raises(ValueError, match="mask"):
            encoder.encode(np.zeros((5, 16), np.float32), np.ones(6, bool))
    with pytest.raises(ValueError, match="closed"):
        encoder.encode(np.zeros((5, 16), np.float32))
    encoder.close()


def test_files_that_are_no_encoder(source: AudioSource, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.onnx"):
        AudioEncoder(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(BundleError, match=r"junk\.onnx"):
        AudioEncoder(tmp_path / "junk.onnx")
    path = write_audio(source, tmp_path)
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    (tmp_path / "no_metadata.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="max_frames"):
        AudioEncoder(tmp_path / "no_metadata.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "rows"
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="rows"):
        AudioEncoder(tmp_path / "other.onnx")
    (tmp_path / "audio.onnx.data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"audio\.onnx"):
        AudioEncoder(path)


# The config. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_round_trip(changes: dict[str, Any]) -> None:
    config = audio_config(**changes)
    assert AudioConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert replace(config, hidden_size=64) != config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 30),
        ("hidden_size", 0),
        ("rms_norm_eps", 1e-5),
        ("conf_num_hidden_layers", 1.5),
        ("conf_attention_logit_cap", -1),
        ("conf_attention_context_left", -1),
        ("sscp_conv_channel_size", [8]),
        ("sscp_conv_channel_size", [8, 0]),
        ("sscp_conv_kernel_size", [[3, 3]]),
        ("sscp_conv_kernel_size", [[3, 3], [3, 40]]),
        ("sscp_conv_stride_size", [[2, 2], 2]),
        ("vocab_offset", None),
    ],
)
def test_a_field_that_is_wrong_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        audio_config(**{field: value})
    # A kernel wider than what it slides over is the fault of either.
    assert error.value.field in (f"audio_config.{field}", "audio_config.input_feat_size")


def test_no_audio_in_a_text_model() -> None:
    with pytest.raises(ConfigError, match="audio_config"):
        AudioConfig.from_dict({"text_config": {"hidden_size": 8}})
