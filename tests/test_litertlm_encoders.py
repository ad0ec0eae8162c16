"""A .litertlm that sees and hears: run by LiteRT-LM and by us, with the same tokens; refused when damaged."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.margins import FP32, assert_decided, recorded
from support.random_gemma3n_vision import random_pixels

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

from gemma_edge.devices.machine.cpu_features import check_engine
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.encoder_weights import token_table
from gemma_edge.export.emit.reference.reference_audio import evaluate_audio
from gemma_edge.export.emit.reference.reference_vision import evaluate_vision
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.litertlm_reader import read_litertlm
from gemma_edge.runtime.errors import BundleError, DeviceError
from gemma_edge.runtime.media.encoder_pool import load_encoder
from gemma_edge.runtime.model import Model
from support.litert_lm_process import run_chat

COUNT, CONTEXT, CHUNK = 16, 512, 64
SECONDS, RATE = 3, 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the tests share: a checkpoint with both encoders, and the folder that the engine packs into."""
    patch = pytest.MonkeyPatch()
    path = tmp_path_factory.mktemp("litertlm_encoders")
    patch.setenv("GEMMA_EDGE_CACHE", str(path / "packed"))
    synthesize(path / "tiny", encoders=True, progress=False)
    yield path
    patch.undo()


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    options: dict[str, Any] = {"recipe": "fp32", "context": CONTEXT, "chunk": CHUNK, "verify": False}
    return export_bundle(folder / "tiny", folder / "m.litertlm", format="litertlm", **options).path


@pytest.fixture(scope="module")
def samples() -> NDArray[np.float32]:
    """A tone that rises, in noise."""
    t = np.arange(SECONDS * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    return ((8000 * np.sin(2 * np.pi * 440 * t * (1 + t / 5)) + 1000 * noise).astype("<i2") / 32768).astype(
        "f4"
    )


@pytest.fixture(scope="module")
def picture(folder: Path) -> Path:
    """Of exactly the model's size, so that no resizing comes into it."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


@pytest.fixture(scope="module")
def recording(folder: Path, samples: NDArray[np.float32]) -> Path:
    with wave.open(str(folder / "recording.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32768).astype("<i2").tobytes())
    return folder / "recording.wav"


@pytest.fixture
def litert_lm() -> None:
    pytest.importorskip("litert_lm", reason="litert-lm-api is not installed")
    try:
        check_engine("litert-lm")
    except DeviceError as error:
        pytest.skip(str(error))


def relative(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The file. ----------------------------------------------------------------------------------------


def test_sections(made: Path) -> None:
    models = [s.model_type for s in read_litertlm(made).sections if s.type == "TFLiteModel"]
    assert models[3:] == [
        "tf_lite_vision_encoder",
        "tf_lite_vision_adapter",
        "tf_lite_audio_encoder_hw",
        "tf_lite_audio_adapter",
        "tf_lite_end_of_audio",
    ]


def test_a_bundle_of_it_has_both_encoders_and_their_tokens(made: Path, folder: Path) -> None:
    bundle = Bundle.open(made)
    bundle.check_hashes()
    with Checkpoint.open(folder / "tiny") as checkpoint:
        assert sorted(bundle.modalities) == ["audio", "vision"]
        for kind, modality in bundle.modalities.items():
            encoder = checkpoint.towers[modality.kind]
            assert (modality.begin_id, modality.end_id) == (encoder.begin_id, encoder.end_id), kind
            rows = modality.token_table().lookup(np.arange(len(modality.ids)))
            np.testing.assert_array_equal(rows, token_table(checkpoint, encoder.config))


def test_its_encoders_are_the_reference(made: Path, folder: Path, samples: NDArray[np.float32]) -> None:
    bundle = Bundle.open(made)
    audio = bundle.audio
    assert audio is not None
    with Checkpoint.open(folder / "tiny") as checkpoint:
        vision: Any = checkpoint.towers["vision"].config
        with load_encoder(bundle, bundle.modalities["vision"], threads=1) as seen:
            got = seen.encode(random_pixels(vision.image_size))
        assert relative(got, evaluate_vision(checkpoint, vision, random_pixels(vision.image_size))) < 1e-3
        features, mask = audio.log_mel(samples)
        with load_encoder(bundle, audio, threads=1) as heard:
            rows = heard.encode(features, mask)
        assert relative(rows, evaluate_audio(checkpoint, audio.config, features, mask)) < 1e-3


def test_a_folder_of_tflite_has_the_same_encoders(
    made: Path, folder: Path, picture: Path, samples: NDArray[np.float32]
) -> None:
    options: dict[str, Any] = {"recipe": "fp32", "context": CONTEXT, "chunk": CHUNK, "verify": False}
    path = export_bundle(folder / "tiny", folder / "tflite", format="tflite", **options).path
    answers = []
    for bundle in (made, path):
        with recorded(model := Model.load(bundle, threads=1)) as logits:
            answers.append(model.generate("hello", attach=[picture], temperature=0, max_tokens=COUNT).text)
        assert_decided(np.stack(logits[-COUNT:]), FP32)
    assert answers[0] == answers[1]
    bundle = Bundle.open(path)
    assert bundle.vision and bundle.audio
    assert (bundle.vision.graph, bundle.audio.graph) == ("vision.tflite", "audio.tflite")
    features = bundle.audio.log_mel(samples)
    rows = []
    for each in (Bundle.open(made), bundle):
        with load_encoder(each, each.modalities["audio"], threads=1) as encoder:
            rows.append(encoder.encode(*features))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


def replaced(old: bytes, new: bytes, count: int = 1) -> Callable[[bytes], bytes]:
    def change(whole: bytes) -> bytes:
        assert old in whole and len(old) == len(new)
        return whole.replace(old, new, count)

    return change


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an adapter is missing": (replaced(b"tf_lite_vision_adapter", b"tf_lite_vision_bdapter"), "sections"),
    "no end of audio": (replaced(b"tf_lite_end_of_audio", b"tf_lite_end_of_birds"), "sections"),
    "a modality of no section": (replaced(b'"vision":{"graph"', b'"revise":{"graph"'), "modalities"),
    "another number of tokens": (replaced(b'"soft_tokens":16', b'"soft_tokens":17'), "soft_tokens"),
    "tokens beyond their section": (replaced(b'"offset":8192,', b'"offset":8704,'), "rows within 16384"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    path = tmp_path / "damaged.litertlm"
    path.write_bytes(change(made.read_bytes()))
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


def test_a_file_for_text_has_no_encoder(folder: Path, tmp_path: Path) -> None:
    source = synthesize(tmp_path / "text", progress=False).path
    options: dict[str, Any] = {"recipe": "int8", "context": 64, "chunk": 16, "verify": False}
    path = export_bundle(source, tmp_path / "t.litertlm", format="litertlm", **options).path
    assert Bundle.open(path).modalities == {}
    with pytest.raises(BundleError, match="no such section"):
        Bundle.open(path).file("vision.tflite")


# LiteRT-LM itself. --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Path:
    """With the encoder of images alone, which is another type of model for LiteRT-LM."""
    options: dict[str, Any] = {"recipe": "fp32", "context": CONTEXT, "chunk": CHUNK, "verify": False}
    options |= {"format": "litertlm", "modalities": ("text", "image")}
    return export_bundle(folder / "tiny", folder / "seeing.litertlm", **options).path


@pytest.mark.usefixtures("litert_lm")
@pytest.mark.parametrize("name", ["made", "seeing"])
def test_litert_lm_sees_what_we_see(
    name: str, picture: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same tokens, the end of the image among them, which LiteRT-LM itself leaves out."""
    compare_answers(request.getfixturevalue(name), picture, tmp_path)


@pytest.mark.usefixtures("litert_lm")
def test_litert_lm_takes_another_image_size(folder: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "larger.png")
    options: dict[str, Any] = {"recipe": "fp32", "context": CONTEXT, "chunk": CHUNK, "verify": False}
    options |= {"format": "litertlm", "modalities": ("text", "image"), "image_size": 128}
    made = export_bundle(folder / "tiny", tmp_path / "larger.litertlm", **options).path
    compare_answers(made, tmp_path / "larger.png", tmp_path)


def compare_answers(path: Path, picture: Path, cache: Path) -> None:
    """LiteRT-LM's answer and ours are the same, and the picture changes them."""
    parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "hello"}]
    theirs = run_chat(path, parts, COUNT, cache)
    model = Model.load(path, threads=1)
    with recorded(model) as logits:
        ours: Any = model.generate("hello", attach=[picture], temperature=0, max_tokens=COUNT)
    assert_decided(np.stack(logits[-COUNT:]), FP32)
    assert theirs["prompt_tokens"] == ours.usage.prompt_tokens
    assert theirs["text"] == ours.text
    without: Any = model.generate("hello", temperature=0, max_tokens=COUNT)
    assert without.text != ours.text


@pytest.mark.usefixtures("litert_lm")
def test_litert_lm_hears_what_we_hear(
    made: Path, recording: Path, samples: NDArray[np.float32], tmp_path: Path
) -> None:
    """The same tokens for a recording, but for one thing: LiteRT-LM does not pad a clip to 30 s."""
    parts = [{"type": "audio", "path": str(recording)}, {"type": "text", "text": "hello"}]
    theirs = run_chat(made, parts, COUNT, tmp_path)
    model = Model.load(made, threads=1)
    audio = model.bundle.audio if model.bundle else None
    assert model.bundle and audio
    features, mask = audio.log_mel(samples)
    with load_encoder(model.bundle, audio, threads=1) as encoder:
        rows = encoder.encode(features, mask)[: audio.config.tokens(len(features))]
    before, after = model.template.render([{"role": "user", "content": parts}]).split("<audio_soft_token>")
    ids = [*model.tokenizer.encode(before + "\n\n", bos=False), audio.begin_id]
    begin = len(ids)
    ids += [audio.soft_id] * len(rows) + [audio.end_id]
    ids += [*model.tokenizer.encode("\n\n", bos=False), *model.tokenizer.encode(after, bos=False)]
    embeddings = model.embeddings.lookup(np.array(ids))
    embeddings[begin : begin + len(rows)] = rows
    assert theirs["prompt_tokens"] == len(ids)
    assert theirs["text"] == greedy(model, np.array(ids), embeddings)


def greedy(model: Model, ids: NDArray[Any], embeddings: NDArray[np.float32]) -> str:
    """The text of `COUNT` likeliest tokens after these."""
    logits = np.zeros((1, 1), np.float32)
    for at in range(0, len(ids), CHUNK):
        rows = slice(at, at + CHUNK)
        logits = model.decoder.forward(embeddings[rows], model.per_layer.lookup(ids[rows]), 1)
    said: list[int] = []
    for _ in range(COUNT):
        assert_decided(logits, FP32)
        said.append(int(logits[-1].argmax()))
        token = np.array(said[-1:])
        logits = model.decoder.forward(model.embeddings.lookup(token), model.per_layer.lookup(token), 1)
    return b"".join(model.tokenizer.token_bytes(i, skip_special=False) for i in said).decode(errors="replace")


def test_what_litert_lm_is_told(made: Path) -> None:
    proto = pytest.importorskip("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    file = read_litertlm(made)
    section = next(s for s in file.sections if s.type == "LlmMetadataProto")
    told = proto.LlmMetadata.FromString(file.read(section)).llm_model_type.generic_model
    assert told.start_of_image_token.token_str == "<start_of_image>"
    assert (told.image_tensor_height, told.audio_fft_length) == (64, 1024)
    assert told.audio_mel_floor == pytest.approx(np.log(1e-5))
    assert re.findall(told.delimiter_regex, "a<image_soft_token>b<audio_soft_token>") == [
        "<image_soft_token>",
        "<audio_soft_token>",
    ]
    assert json.loads(file.system["gemma_edge.manifest"])["modalities"]["vision"]["soft_tokens"] == 16
