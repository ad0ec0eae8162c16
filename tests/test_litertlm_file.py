"""The .litertlm file: written, read back, refused when damaged, and run by LiteRT-LM itself."""

from __future__ import annotations

import codecs
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.devices.machine.cpu_features import check_engine, missing_feature
from gemma_edge.runtime.artifacts.litertlm_reader import CONFIG_KEY, read_litertlm
from gemma_edge.runtime.errors import BundleError, ConfigError, DeviceError, TokenizerError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampling
from support.margins import FP32, assert_decided, int8_activations, step_logits
from support.tiny_tokenizer import write_tokenizer

pytest.importorskip("ai_edge_litert", reason="the LiteRT schema is not installed")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.formats.litertlm.litertlm_file import Contents, write_litertlm
from gemma_edge.export.formats.litertlm.llm_metadata import LlmFacts, llm_metadata, pad_tokenizer
from gemma_edge.export.synth.synth_checkpoint import synthesize
from support.bigram_tflite import bigram, tiny_config, write_models
from support.litert_lm_process import run_greedy

CONTEXT, STOP = 64, (1, 5)
FIRST_TEXT_PIECE, PIECES = 264, 299  # of `write_tokenizer`: what comes before are special and byte pieces
ADDED = {"<image_soft_token>": 316}


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def made(tmp_path_factory, config):
    return build(tmp_path_factory.mktemp("litertlm"), config)


def build(folder: Path, config, head=None, **changes) -> Path:
    source = write_tokenizer(folder / "tokenizer.model").read_bytes()
    tokenizer = pad_tokenizer(source, ADDED, config.vocab_size)
    metadata = llm_metadata(
        LlmFacts(**{"config": config, "stop_ids": STOP, "max_tokens": CONTEXT, **changes})
    )
    models = write_models(folder, config, context=CONTEXT, head=head)
    return write_litertlm(folder / "model.litertlm", Contents(config, tokenizer, metadata), models)


@pytest.fixture
def damage(made, tmp_path):
    """A copy of the file with bytes replaced at an offset."""

    def copy(offset: int, data: bytes) -> Path:
        path = tmp_path / "damaged.litertlm"
        whole = bytearray(made.read_bytes())
        whole[offset : offset + len(data)] = data
        path.write_bytes(whole)
        return path

    return copy


def header_position(made: Path, value: int) -> int:
    """Where the header holds an unsigned 64-bit value."""
    head = made.read_bytes()[:16384]
    return head.index(struct.pack("<Q", value), 32)


# Writing. -----------------------------------------------------------------------------------------


def test_sections(made):
    file = read_litertlm(made)
    assert [(s.type, s.model_type) for s in file.sections] == [
        ("LlmMetadataProto", ""),
        ("SP_Tokenizer", ""),
        ("TFLiteModel", "tf_lite_embedder"),
        ("TFLiteModel", "tf_lite_per_layer_embedder"),
        ("TFLiteModel", "tf_lite_prefill_decode"),
    ]
    assert all(s.begin % 16384 == 0 for s in file.sections)
    assert file.sections[-1].end == made.stat().st_size


def test_metadata(made, config):
    file = read_litertlm(made)
    assert (file.llm.start_ids, file.llm.stop_ids, file.llm.max_tokens) == ((2,), ((1,), (5,)), CONTEXT)
    assert file.config == config
    assert "start_of_turn" in file.llm.template
    assert (file.signatures.prefill, file.signatures.context) == ((4, 8), CONTEXT)


def test_models_are_copied_unchanged(made):
    file = read_litertlm(made)
    for name in ("prefill_decode", "embedder", "per_layer_embedder"):
        section = file.section("TFLiteModel", f"tf_lite_{name}")
        assert file.read(section) == (made.parent / f"{name}.tflite").read_bytes()


def test_every_id_has_a_piece(made, tmp_path, config):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(read_litertlm(made).tokenizer_model)
    padded, original = Tokenizer(path), Tokenizer(made.parent / "tokenizer.model", ADDED)
    assert padded.n_pieces == config.vocab_size
    text = "the heart<image_soft_token> and <no_piece_300>"
    assert padded.encode(text, bos=True)[:7] == original.encode(text, bos=True)[:7]
    assert ADDED["<image_soft_token>"] in padded.encode(text, bos=True)


def test_a_tokenizer_with_too_many_pieces(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="vocab_size = 100"):
        pad_tokenizer(path.read_bytes(), {}, 100)


def test_a_tokenizer_that_is_none():
    with pytest.raises(TokenizerError, match="SentencePiece"):
        pad_tokenizer(b"\xff\xff\xff", {}, 100)


def test_sampling_is_recorded(config):
    proto = pytest.importorskip("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    metadata = proto.LlmMetadata.FromString(
        llm_metadata(LlmFacts(config, STOP, 8, "x", Sampling(0.7, 0, 0.9)))
    )
    assert metadata.sampler_params.k == config.vocab_size
    assert metadata.sampler_params.temperature == pytest.approx(0.7)
    assert metadata.jinja_prompt_template == "x"


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ messages }}{{ tools }}"])
def test_function_calling_is_said_of_a_template_that_takes_tools(config, template):
    proto = pytest.importorskip("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    metadata = proto.LlmMetadata.FromString(llm_metadata(LlmFacts(config, STOP, 8, template)))
    assert metadata.supports_function_calling == ("tools" in template)


def test_a_template_does_not_write_a_second_bos(config):
    proto = pytest.importorskip("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    metadata = proto.LlmMetadata.FromString(llm_metadata(LlmFacts(config, STOP, 8, "<bos>hello")))
    assert metadata.jinja_prompt_template == "hello"


def test_a_failed_export_leaves_the_old_file_and_nothing_else(made, config, tmp_path):
    target = build(tmp_path, config)
    before, names = target.read_bytes(), sorted(os.listdir(tmp_path))
    with pytest.raises(BundleError, match="max_num_tokens"):
        build(tmp_path, config, max_tokens=CONTEXT + 1)
    assert target.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


def test_a_config_without_bos(tmp_path):
    with pytest.raises(ConfigError, match="bos_token_id"):
        build(tmp_path, tiny_config(bos_token_id=None))


def test_a_config_too_long_for_the_header(tmp_path):
    layers = {"num_hidden_layers": 600, "layer_types": ["sliding_attention", "full_attention"] * 300}
    with pytest.raises((ConfigError, BundleError), match="header"):
        build(tmp_path, tiny_config(**layers, num_kv_shared_layers=598))


# Damage. ------------------------------------------------------------------------------------------


def test_truncation_anywhere_is_refused(made, tmp_path):
    whole = made.read_bytes()
    edges = [0, 1, 7, 8, 20, 31, 32, 100, 16383, 16384, len(whole) - 1]
    path = tmp_path / "short.litertlm"
    for size in sorted({*edges, *range(0, len(whole), 4999)}):
        path.write_bytes(whole[:size])
        with pytest.raises(BundleError):
            read_litertlm(path)


def test_bytes_after_the_end_are_refused(made, tmp_path):
    path = tmp_path / "long.litertlm"
    path.write_bytes(made.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="end of the last section"):
        read_litertlm(path)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"LITERTML", "magic"),
        (8, struct.pack("<I", 2), "version"),
        (24, struct.pack("<Q", 0), "header end"),
        (24, struct.pack("<Q", 1 << 40), "header end"),
        (24, struct.pack("<Q", 40), "expected"),
        (32, struct.pack("<I", 0xFFFFFFF0), "expected"),
    ],
)
def test_a_header_that_lies(damage, offset, data, message):
    with pytest.raises(BundleError, match=message):
        read_litertlm(damage(offset, data))


@pytest.mark.parametrize("delta", [-16384, 16384, 1, 1 << 50])
def test_a_section_that_begins_elsewhere(made, damage, delta):
    begin = read_litertlm(made).section("TFLiteModel", "tf_lite_embedder").begin
    with pytest.raises(BundleError):
        read_litertlm(damage(header_position(made, begin), struct.pack("<q", begin + delta)))


@pytest.mark.parametrize("delta", [-16384, 16384, 20000, -1 << 20, 1 << 50])
def test_a_section_that_ends_elsewhere(made, damage, delta):
    end = read_litertlm(made).section("TFLiteModel", "tf_lite_per_layer_embedder").end
    with pytest.raises(BundleError):
        read_litertlm(damage(header_position(made, end), struct.pack("<Q", (end + delta) % 2**64)))


def test_overlapping_sections(made, damage):
    file = read_litertlm(made)
    first, second = (file.section("TFLiteModel", f"tf_lite_{n}embedder") for n in ("", "per_layer_"))
    with pytest.raises(BundleError, match="after its neighbour"):
        read_litertlm(damage(header_position(made, second.begin), struct.pack("<Q", first.begin)))


@pytest.mark.parametrize("name", [b"tf_lite_embedder", b"tf_lite_prefill_decode"])
def test_a_missing_model(made, damage, name):
    at = made.read_bytes().index(name)
    with pytest.raises(BundleError, match="sections"):
        read_litertlm(damage(at, name[:-1] + b"x"))


def test_another_model_type(made, damage, config):
    metadata = llm_metadata(LlmFacts(config, STOP, CONTEXT))
    at = made.read_bytes().index(b"\x32\x02\x12\x00", 16384)  # llm_model_type { gemma3n {} }
    assert b"\x32\x02\x12\x00" in metadata
    with pytest.raises(BundleError, match="gemma3n"):
        read_litertlm(damage(at + 2, b"\x22"))  # gemma3


def test_a_tokenizer_with_too_few_pieces(made, damage):
    begin = read_litertlm(made).section("SP_Tokenizer").begin
    with pytest.raises(BundleError, match="SP_Tokenizer"):
        read_litertlm(damage(begin, b"\x12"))  # the first piece becomes another field


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 321}, {"hidden_size": 32}, {"num_hidden_layers": 4}, {"head_dim": 16}],
    ids=lambda change: next(iter(change)),
)
def test_another_models_file(made, change):
    layers = change.get("num_hidden_layers", 3)
    types = ["sliding_attention", *["full_attention"] * (layers - 1)]
    with pytest.raises(BundleError):
        read_litertlm(made, tiny_config(**change, layer_types=types))


def test_a_file_without_its_config(made, damage):
    at = made.read_bytes().index(CONFIG_KEY.encode())
    path = damage(at, b"x")
    with pytest.raises(BundleError, match="config"):
        read_litertlm(path)
    assert read_litertlm(path, tiny_config()).llm.max_tokens == CONTEXT


@settings(max_examples=300, deadline=None)
@given(bit=st.integers(0, 8 * 4096 - 1))
def test_a_flipped_bit_of_the_header_is_refused_or_harmless(made, tmp_path_factory, bit):
    whole = bytearray(made.read_bytes())
    (end,) = struct.unpack_from("<Q", whole, 24)
    at = (bit // 8) % end
    whole[at] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped.litertlm"
    path.write_bytes(whole)
    original = read_litertlm(made)
    try:
        file = read_litertlm(path, original.config)
    except BundleError:
        return
    # What passes says the same of every byte that an engine would go to.
    assert file.sections == original.sections


def test_no_such_file(tmp_path):
    with pytest.raises(BundleError, match="readable"):
        read_litertlm(tmp_path / "nothing.litertlm")


# CPUs. --------------------------------------------------------------------------------------------

PI4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n"
PI5 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes atomics fphp asimdhp cpuid asimddp\n"


def test_a_raspberry_pi_4_cannot_run_litert_lm():
    assert missing_feature("litert-lm", "aarch64", PI4)
    with pytest.raises(DeviceError, match="LSE atomics"):
        check_engine("litert-lm", machine="aarch64", cpuinfo=PI4)


@pytest.mark.parametrize(
    ("engine", "machine", "cpuinfo"),
    [
        ("litert-lm", "aarch64", PI5),
        ("litert-lm", "x86_64", "flags\t: fpu sse\n"),
        ("litert-lm", "arm64", ""),
        ("litert", "aarch64", PI4),
        ("onnxruntime", "aarch64", PI4),
    ],
)
def test_cpus_that_can(engine, machine, cpuinfo):
    check_engine(engine, machine=machine, cpuinfo=cpuinfo)


def test_one_core_without_the_feature_is_enough():
    assert missing_feature("litert-lm", "aarch64", PI5 + PI4)


# LiteRT-LM itself. --------------------------------------------------------------------------------


@pytest.fixture
def litert_lm():
    pytest.importorskip("litert_lm", reason="litert-lm-api is not installed")
    try:
        check_engine("litert-lm")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("litert_lm")
def test_litert_lm_runs_it(tmp_path, config):
    # Only pieces of text can be chosen, so that each step's text says which token it was.
    embedding, head = bigram(config)
    head[:FIRST_TEXT_PIECE] = head[PIECES:] = 0
    path = build(tmp_path, config, head)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model", ADDED, config.vocab_size)
    prompt, count = "the heart", 24
    ids = tokenizer.encode(prompt, bos=True)
    token, expected = ids[-1], []
    for _ in range(count):
        token = int(np.argmax(head.astype(np.int64) @ embedding[token]))
        expected.append(tokenizer.token_text(token).replace("▁", " "))
    answer = run_greedy(path, prompt, count, tmp_path)
    assert answer["pieces"] == expected
    assert (answer["start"], answer["stop"]) == (2, [[1], [5]])
    # Exactly one bos, in a completion and in a conversation.
    assert answer["prompt_tokens"] == len(ids)
    turn = ChatTemplate().render([{"role": "user", "content": prompt}])
    assert answer["chat_tokens"] == len(tokenizer.encode(turn, bos=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    with Checkpoint.open(synthesize(path, "tiny", progress=False).path) as opened:
        yield opened


PROMPT, COUNT, CONTEXT_TINY = "The quick brown fox", 32, 128
POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
REPEAT = "Repeat: Vera 186 cabinet Athens garage Rome 956 blue"


def exported(checkpoint: Path, folder: Path, recipe: str, context: int) -> tuple[Path, Path]:
    """The .litertlm and the folder of a checkpoint's text model."""
    options = {"recipe": recipe, "context": context, "chunk": 32, "verify": False, "modalities": ["text"]}
    options["calibrate"] = "none"
    paths = folder / "model.litertlm", folder / "out"
    for path, format in zip(paths, ("litertlm", "tflite"), strict=True):
        export_bundle(checkpoint, path, format=format, **options)
    return paths


codecs.register_error("each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids as SentencePiece spells it: one U+FFFD for each byte that is no character."""
    return b"".join(tokenizer.token_bytes(i, skip_special=False) for i in ids).decode("utf-8", "each byte")


@pytest.mark.usefixtures("litert_lm")
def test_litert_lm_gives_the_tokens_of_our_runtime(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    path, out = exported(checkpoint.path, tmp_path, "fp32", CONTEXT_TINY)
    model = Model.load(out)
    prompt = model.tokenizer.encode(PROMPT, bos=True)
    ids = list(model.stream_tokens(prompt, max_tokens=COUNT))
    # Both give those of the checkpoint's own mathematics, which leave no CPU a choice.
    (logits,) = evaluate(checkpoint, [[*prompt, *ids[:-1]]], last=COUNT)
    assert_decided(logits, FP32)
    assert logits.argmax(axis=-1).tolist() == ids
    assert list(Model.load(path).stream_tokens(prompt, max_tokens=COUNT)) == ids
    answer = run_greedy(path, PROMPT, COUNT, tmp_path)
    assert (answer["prompt_tokens"], answer["tokens"]) == (len(prompt), COUNT)
    assert "".join(answer["pieces"]) == spelled(ids, model.tokenizer)
    assert answer["chat_tokens"] == len(model.prompt_ids(PROMPT))
    assert model.end_ids == {i for stop in answer["stop"] for i in stop}


@pytest.mark.usefixtures("litert_lm")
@pytest.mark.parametrize("name", ["int4_g32", "int8"])
def test_litert_lm_answers_as_our_runtime_does(tmp_path, monkeypatch, name):
    """With Pocket: random weights nearly tie so often that the rounding of 8-bit activations decides."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    path, out = exported(POCKET, tmp_path, name, 512)
    for model in (Model.load(out), Model.load(path)):
        prompt = model.prompt_ids(REPEAT)
        ids = list(model.stream_tokens(prompt, max_tokens=COUNT, end_ids=model.end_ids))
        logits = step_logits(model, prompt, ids)
        assert_decided(logits, int8_activations(logits))
        text = model.generate(REPEAT, temperature=0.0, max_tokens=COUNT).text
        assert text == REPEAT.partition(": ")[2]
    rendered = model.template.render([{"role": "user", "content": REPEAT}]).removeprefix("<bos>")
    answer = run_greedy(path, rendered, COUNT, tmp_path)
    assert answer["prompt_tokens"] == len(prompt)
    assert "".join(answer["pieces"]).removesuffix("<end_of_turn>") == text
