"""What a campaign runs: for each kind of file, how it is damaged and what then reads it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from . import valid_inputs
from .mutators import (
    damaged_bytes,
    damaged_safetensors,
    damaged_sealed,
    damaged_text,
    damaged_weights,
    damaged_wire,
    damaged_words,
    either,
    json_bytes,
    random_template,
)
from .tool_subjects import (
    answer_files,
    damaged_answer,
    damaged_grammar,
    damaged_tools,
    grammar_files,
    read_answer,
    read_grammar,
    read_schema,
    read_tools,
    schema_files,
    tool_files,
)

Files = dict[str, bytes]
MODELS = "GEMMA_EDGE_FUZZ_MODELS"
MESSAGES = [
    {"role": "user", "content": "the thing"},
    {"role": "assistant", "content": "in"},
    {"role": "user", "content": "x"},
]


@dataclass(frozen=True)
class Subject:
    """One kind of file.

    Attributes:
        weight: how often it is drawn, in thousands of about 2.5 million cases; what is cheap is drawn more.
        valid: the folder of valid files that reading needs, copied for every worker.
        damage: the changed files, by name, from a seed.
        read: what is done with the folder: all that a user's command would do with these files.
    """

    name: str
    weight: float
    valid: Callable[[], Files]
    damage: Callable[[Random, Files], Files]
    read: Callable[[Path], object]


def folder_files(name: str) -> Callable[[], Files]:
    return lambda: {path.name: path.read_bytes() for path in sorted((models() / name).iterdir())}


def one_file(name: str, as_name: str | None = None) -> Callable[[], Files]:
    return lambda: {as_name or name: (models() / name).read_bytes()}


def models() -> Path:
    """Where `make_valid` wrote: the campaign sets it before it forks."""
    return Path(os.environ[MODELS])


def changing(name: str, damage: Callable[[Random, bytes], bytes]) -> Callable[[Random, Files], Files]:
    return lambda rng, files: {name: damage(rng, files[name])}


def changing_json(*names: str) -> Callable[[Random, Files], Files]:
    def damage(rng: Random, files: Files) -> Files:
        name = rng.choice(names)
        return {name: json_bytes(rng, json.loads(files[name]))}

    return damage


def changing_any(damage: Callable[[Random, bytes], bytes]) -> Callable[[Random, Files], Files]:
    """One of several files of a kind, damaged under its own name."""

    def changed(rng: Random, files: Files) -> Files:
        name = rng.choice(sorted(files))
        return {"damaged-" + name: damage(rng, files[name])}

    return changed


def resealed(damage: Callable[[Random, Files], Files]) -> Callable[[Random, Files], Files]:
    """The manifest's sizes and hashes are made right again, mostly: damage by somebody who knows how."""

    def changed(rng: Random, files: Files) -> Files:
        out = damage(rng, files)
        if "manifest.json" in out or rng.random() < 0.05:
            return out
        manifest = json.loads(files["manifest.json"])
        for name, data in out.items():
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return {**out, "manifest.json": json.dumps(manifest).encode()}

    return changed


def light_bundle(name: str) -> Callable[[], Files]:
    """A bundle with little that every case would hash and compile anew, though it is not damaged there."""

    def files() -> Files:
        found = folder_files(name)()
        manifest = json.loads(found["manifest.json"])
        changed = {"chat_template.jinja": b"{{ messages[0]['content'] }}"}
        if "vision.onnx.data" in found:
            changed["vision.onnx.data"] = found["vision.onnx.data"][:4096]
        for file, data in changed.items():
            manifest["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return {**found, **changed, "manifest.json": json.dumps(manifest).encode()}

    return files


# What reads them. -----------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> None:
    from gemma_edge.export.checkpoint.checkpoint import Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        checkpoint.revision()
        checkpoint.chat_template()
        for name in checkpoint.specs:
            checkpoint.read(name)


def quantize_checkpoint(folder: Path) -> None:
    from gemma_edge.export.exporter import export_bundle

    target = folder.parent / "exported"
    shutil.rmtree(target, ignore_errors=True)
    draw = zlib.crc32((folder / "model.safetensors").read_bytes()) % 10
    form = {0: "tflite", 1: "litertlm"}.get(draw, "onnx")  # its export takes a third of the time
    export_bundle(folder, target, recipe="int4", context=64, chunk=32, verify=False, format=form)


def read_config(folder: Path) -> None:
    from gemma_edge.export.checkpoint.checkpoint import described
    from gemma_edge.export.exporter import resolve_recipe
    from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
    from gemma_edge.runtime.engines.kv_cache import cache_layouts
    from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

    config, encoders = described(folder)
    tensor_specs(config)
    for encoder in encoders.values():
        assert encoder.specs
    cache_layouts(config, "fp32")
    resolve_recipe("int4", None, "onnx")
    assert Gemma3nConfig.from_dict(config.to_dict()) == config


def read_side_files(folder: Path) -> None:
    from gemma_edge.export.checkpoint.checkpoint import Checkpoint
    from gemma_edge.export.checkpoint.tokenizer_files import tokenizer_files
    from gemma_edge.runtime.generation_config import read_generation_config

    with Checkpoint.open(folder) as checkpoint:
        checkpoint.generation_config()
        checkpoint.chat_template()
        tokenizer_files(checkpoint)
    read_generation_config(folder / "generation_config.json", (1,))


def read_tokenizer(folder: Path) -> None:
    from gemma_edge.runtime.prompt.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder / "tokenizer.model", {"<image_soft_token>": 545}, 560)
    ids = tokenizer.encode("<bos>the thing in\n<start_of_turn>é", bos=False)
    tokenizer.decode([*ids, *range(0, tokenizer.vocab_size, 7)])


def convert_tokenizer(folder: Path) -> None:
    from gemma_edge.export.checkpoint.checkpoint import MAX_SIDE_BYTES
    from gemma_edge.export.checkpoint.tokenizer_files import convert
    from gemma_edge.runtime.errors import TokenizerError
    from gemma_edge.runtime.files.text_files import read_json

    path = folder / "tokenizer.json"
    convert(read_json(path, TokenizerError, limit=MAX_SIDE_BYTES), {}, path)


def render(folder: Path) -> None:
    from gemma_edge.runtime.prompt.chat_template import ChatTemplate

    path = folder / "chat_template.jinja"
    ChatTemplate(path.read_text(encoding="utf-8"), path).render(MESSAGES)


def open_bundle(folder: Path) -> None:
    from gemma_edge.runtime.artifacts.bundle import Bundle

    Bundle.open(folder).check_hashes()


def answer(folder: Path) -> None:
    from gemma_edge.runtime.model import Model

    model = Model.load(folder, threads=1)
    model.generate("the thing", max_tokens=2, temperature=0)


def inspect_bundle(folder: Path) -> None:
    from gemma_edge.cli.main import _dispatch

    with contextlib.redirect_stdout(io.StringIO()) as out:
        _dispatch(["inspect", str(folder)])
    assert out.getvalue().replace("\n", "").isprintable(), "what is printed has control characters"


def read_table(folder: Path) -> None:
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.artifacts.ple_table import PleTable

    bundle = Bundle.open(folder)
    layout = bundle.member("tables", dict)["per_layer"]
    PleTable(folder / "ple.bin", layout, bundle.config).lookup(np.arange(0, 500, 11))


def read_layout(folder: Path) -> None:
    from gemma_edge.runtime.artifacts.row_table import RowTable
    from gemma_edge.runtime.errors import BundleError
    from gemma_edge.runtime.files.text_files import read_json

    layout = read_json(folder / "layout.json", BundleError)
    table = RowTable(folder / "ple.bin", layout)
    table.lookup(np.arange(0, min(table.rows, 500), 11))
    table.close()


def read_model_file(folder: Path) -> None:
    from gemma_edge.runtime.artifacts.tflite_check import check_decoder
    from gemma_edge.runtime.artifacts.tflite_reader import read_tflite
    from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

    config = Gemma3nConfig.from_dict(
        json.loads((models() / "tflite" / "manifest.json").read_bytes())["config"]
    )
    check_decoder(read_tflite(folder / "decoder.tflite"), config)


def read_single_file(folder: Path) -> None:
    from gemma_edge.runtime.artifacts.bundle import Bundle

    Bundle.open(folder / "model.litertlm")


def answer_single_file(folder: Path) -> None:
    answer(folder / "model.litertlm")


def read_recipe(folder: Path) -> None:
    from gemma_edge.export.weights.recipe import load_recipe

    load_recipe(folder / "recipe.json")


@cache
def session_model() -> Any:
    from gemma_edge.runtime.model import Model

    return Model.load(models() / "onnx", threads=1)


def read_session(folder: Path) -> None:
    from gemma_edge.runtime.conversation import Conversation

    options = {"max_tokens": 2, "temperature": 0}
    conversation = Conversation.load(
        session_model(), folder / "x.session", overflow="drop-oldest", options=options
    )
    conversation.answer("in")
    conversation.save(folder / "saved.session")


def read_prefix(folder: Path) -> None:
    """A prompt that the prefix would begin: damage is a miss, and never an error."""
    from gemma_edge.runtime.errors import GemmaEdgeError
    from gemma_edge.runtime.files.cache_folder import cache_folder
    from gemma_edge.runtime.files.sealed_arrays import read_header
    from gemma_edge.runtime.reuse.prefix_files import PrefixFiles
    from gemma_edge.runtime.reuse.prompt_cache import PromptCache

    cache_folder().mkdir(parents=True, exist_ok=True)
    name = f"{valid_inputs.PREFIX_OF[:32]}-{'0' * 32}.prefix"
    (cache_folder() / name).write_bytes((folder / "x.prefix").read_bytes())
    cache = PromptCache(session_model().decoder, files=PrefixFiles(valid_inputs.PREFIX_OF, 1 << 30, least=4))
    keys = [*read_header(models() / "session" / "x.prefix")["kv"]["keys"], 7, 8]
    try:
        if not cache.begin(cache.find(keys), keys):
            assert cache.begin(cache.find(keys), keys), "a prefix that no decoder takes is found again"
    except GemmaEdgeError as error:
        raise AssertionError(f"an error instead of a miss: {error}") from None


def read_results(folder: Path) -> None:
    from gemma_edge.benchmarks.output.plots import render_plots
    from gemma_edge.benchmarks.output.report import render_page
    from gemma_edge.benchmarks.output.result_text import to_csv, to_markdown
    from gemma_edge.benchmarks.output.table import render_table
    from gemma_edge.benchmarks.records.results_file import read_records

    records = read_records(folder / "results.jsonl")
    if records:
        render_page(records)
        to_markdown(records)
        to_csv(records)
        render_table(records)
        render_plots(records)


def read_batch(folder: Path) -> None:
    from gemma_edge.runtime.batches.answers_file import AnswersFile
    from gemma_edge.runtime.batches.batch import BatchRequest
    from gemma_edge.runtime.batches.prompts_file import read_prompts
    from gemma_edge.runtime.errors import GemmaEdgeError

    for line in read_prompts(folder / "prompts.jsonl"):
        if not isinstance(line.request, BatchRequest):
            assert line.error is not None
            assert str(line.error).isprintable(), "an error has control characters"
            continue
        with contextlib.suppress(GemmaEdgeError):
            batch_model().generate(line.request.prompt, stream=True, **line.request.options).cancel()
    shutil.copy(folder / "answers.jsonl", folder / "copy.jsonl")
    with AnswersFile(folder / "copy.jsonl") as answers:
        answers.append({"line": 1, "key": ""})


@cache
def batch_model() -> Any:
    from gemma_edge.runtime.model import Model

    return Model.load(models() / "onnx", threads=1)


def read_request(folder: Path) -> None:
    """The body of a request to the server, up to the prompt that the engine would get."""
    from gemma_edge.runtime.errors import UsageError
    from gemma_edge.runtime.server.api_error import ApiError
    from gemma_edge.runtime.server.chat_request import chat_request
    from gemma_edge.runtime.server.completion_request import completion_request
    from gemma_edge.runtime.server.request_fields import RequestFields, parse_object
    from gemma_edge.runtime.server.responses_request import responses_request
    from gemma_edge.runtime.server.server_options import Limits

    path, limits = damaged_file(folder), Limits()
    readers = {"chat": chat_request, "completion": completion_request, "responses": responses_request}
    read = readers[path.stem.removeprefix("damaged-")]
    try:
        fields = RequestFields(parse_object(path.read_bytes(), limits))
        fields.text("model")
        asked = read(fields, limits, 64)
    except ApiError as error:
        json.dumps(error.body)
        raise UsageError(error.message) from None
    options = {name: asked.options[name] for name in ("raw", "tools", "tool_choice") if name in asked.options}
    batch_model().prompt_for(asked.prompt, **options)


def damaged_file(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("damaged-*"))), None) or sorted(folder.iterdir())[0]


def read_picture(folder: Path) -> None:
    from gemma_edge.runtime.media.attachments import kind_of
    from gemma_edge.runtime.media.images import load_image

    path = damaged_file(folder)
    kind_of(path)
    load_image(path, 64)


def read_recording(folder: Path) -> None:
    from gemma_edge.runtime.media.attachments import kind_of
    from gemma_edge.runtime.media.recordings import read_audio

    path = damaged_file(folder)
    kind_of(path)
    for segment in read_audio(path):
        assert np.isfinite(features(segment.samples)).all(), "features are not finite"


def features(samples: Any) -> Any:
    from gemma_edge.runtime.families.log_mel import LogMel

    return LogMel()(samples)[0]


def read_video(folder: Path) -> None:
    from gemma_edge.runtime.media.attachments import kind_of
    from gemma_edge.runtime.media.recordings import decoded_segments
    from gemma_edge.runtime.media.video import has_pictures, has_sound, sample_frames, sound

    path = damaged_file(folder)
    kind_of(path)
    if has_pictures(path):
        list(sample_frames(path, 32, count=2))
    if has_sound(path):
        list(decoded_segments(path, sound(path)))


# The damage that needs more than one mutator. --------------------------------------------------------


def sharded_files() -> Files:
    """The checkpoint in two shards with an index."""
    files = folder_files("checkpoint")()
    raw = files.pop("model.safetensors")
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    names, weight_map = sorted(header), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard, at, pieces = {}, 0, []
        for name in part:
            begin, end = header[name]["data_offsets"]
            shard[name] = {**header[name], "data_offsets": [at, at + end - begin]}
            at += end - begin
            pieces.append(body[begin:end])
            weight_map[name] = f"shard-{number}.safetensors"
        text = json.dumps(shard).encode()
        files[f"shard-{number}.safetensors"] = len(text).to_bytes(8, "little") + text + b"".join(pieces)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def damaged_template(rng: Random, raw: bytes) -> bytes:
    if rng.random() < 0.7:
        return random_template(rng).encode("utf-8", "replace")
    return damaged_text(rng, raw.decode()).encode("utf-8", "replace")


def damaged_tokenizer_json(rng: Random, files: Files) -> Files:
    if rng.random() < 0.995:
        return changing_json("tokenizer.json")(rng, files)
    data = json.loads(files["tokenizer.json"])
    tokens = [{"id": 300 + i, "content": f"<t{i}>"} for i in range(rng.choice((1_000, 50_000)))]
    return {"tokenizer.json": json.dumps({**data, "added_tokens": tokens}).encode()}


def damaged_results(rng: Random, raw: bytes) -> bytes:
    lines = raw.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = json_bytes(rng, json.loads(lines[index])).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def damaged_batch(rng: Random, files: Files) -> Files:
    name = rng.choice(("prompts.jsonl", "prompts.jsonl", "answers.jsonl"))
    raw = files[name]
    return {name: damaged_results(rng, raw) if rng.random() < 0.8 else damaged_bytes(rng, raw)}


def damaged_request(rng: Random, files: Files) -> Files:
    name = rng.choice(sorted(files))
    raw = files[name]
    return {
        f"damaged-{name}": json_bytes(rng, json.loads(raw)) if rng.random() < 0.8 else damaged_bytes(rng, raw)
    }


def table_files() -> Files:
    manifest = json.loads((models() / "onnx" / "manifest.json").read_bytes())
    layout = json.dumps(manifest["tables"]["per_layer"]).encode()
    return {"ple.bin": (models() / "onnx" / "ple.bin").read_bytes(), "layout.json": layout}


def text_side_files() -> Files:
    files = folder_files("checkpoint")()
    files["tokenizer.json"] = (models() / "tokenizer.json").read_bytes()
    return files


def weight_files(rng: Random, files: Files) -> Files:
    name = rng.choice(("decoder.onnx.data", "ple.bin"))
    return {name: damaged_bytes(rng, files[name]) if rng.random() < 0.5 else noisy(rng, files[name])}


def noisy(rng: Random, raw: bytes) -> bytes:
    """Floats among the weights become huge, NaN or infinite."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 10, 1000))):
        at = 4 * rng.randrange(len(data) // 4)
        data[at : at + 4] = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff")
        )
    return bytes(data)


@cache
def subjects() -> dict[str, Subject]:
    """All of them, by name."""
    wire, words = (
        either(damaged_wire, damaged_wire, damaged_bytes),
        either(damaged_words, damaged_words, damaged_bytes),
    )
    checkpoint, tflite = folder_files("checkpoint"), light_bundle("tflite")
    onnx, encoders = light_bundle("onnx"), light_bundle("encoders")
    side = ("tokenizer_config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json")
    listed = [
        Subject(
            "safetensors",
            100,
            checkpoint,
            changing("model.safetensors", damaged_safetensors),
            read_checkpoint,
        ),
        Subject("index", 60, sharded_files, changing_json("model.safetensors.index.json"), read_checkpoint),
        Subject(
            "config",
            150,
            folder_files("multimodal-configs"),
            changing_json("config.json", "preprocessor_config.json"),
            read_config,
        ),
        Subject(
            "weights", 13, checkpoint, changing("model.safetensors", damaged_weights), quantize_checkpoint
        ),
        Subject("side files", 50, text_side_files, changing_json(*side), read_side_files),
        Subject(
            "tokenizer",
            150,
            one_file("checkpoint/tokenizer.model", "tokenizer.model"),
            changing("tokenizer.model", wire),
            read_tokenizer,
        ),
        Subject("tokenizer.json", 90, one_file("tokenizer.json"), damaged_tokenizer_json, convert_tokenizer),
        Subject(
            "template",
            30,
            one_file("checkpoint/chat_template.jinja", "chat_template.jinja"),
            changing("chat_template.jinja", damaged_template),
            render,
        ),
        Subject("manifest", 120, encoders, changing_json("manifest.json"), open_bundle),
        Subject("inspect", 60, onnx, changing_json("manifest.json"), inspect_bundle),
        Subject("manifest, answer", 20, onnx, changing_json("manifest.json"), answer),
        Subject("manifest, LiteRT", 13, tflite, changing_json("manifest.json"), answer),
        Subject("graph", 15, onnx, resealed(changing("decoder.onnx", wire)), answer),
        Subject("external data", 13, onnx, resealed(weight_files), answer),
        Subject("row table", 60, onnx, resealed(changing("ple.bin", damaged_bytes)), read_table),
        Subject("row layout", 310, table_files, changing_json("layout.json"), read_layout),
        Subject(
            "TFLite",
            30,
            lambda: {"decoder.tflite": tflite()["decoder.tflite"]},
            changing("decoder.tflite", words),
            read_model_file,
        ),
        Subject("TFLite, answer", 13, tflite, resealed(changing("decoder.tflite", words)), answer),
        Subject(
            "litertlm", 40, one_file("model.litertlm"), changing("model.litertlm", words), read_single_file
        ),
        Subject(
            "litertlm, answer",
            13,
            one_file("model.litertlm"),
            changing("model.litertlm", words),
            answer_single_file,
        ),
        Subject("recipe", 390, one_file("recipe.json"), changing_json("recipe.json"), read_recipe),
        Subject(
            "results", 30, one_file("results.jsonl"), changing("results.jsonl", damaged_results), read_results
        ),
        Subject("session", 60, folder_files("session"), changing("x.session", damaged_sealed), read_session),
        Subject("prefix", 60, folder_files("session"), changing("x.prefix", damaged_sealed), read_prefix),
        Subject("batch", 20, folder_files("batch"), damaged_batch, read_batch),
        Subject("requests", 300, folder_files("requests"), damaged_request, read_request),
        Subject("tools", 20, tool_files, damaged_tools, read_tools),
        Subject("tool answers", 60, answer_files, damaged_answer, read_answer),
        Subject("schema", 30, schema_files, changing_json("schema.json"), read_schema),
        Subject("grammars", 20, grammar_files, changing("grammar.lark", damaged_grammar), read_grammar),
        Subject("pictures", 250, folder_files("pictures"), changing_any(damaged_bytes), read_picture),
        Subject("recordings", 40, folder_files("recordings"), changing_any(damaged_bytes), read_recording),
        Subject("videos", 20, folder_files("videos"), changing_any(damaged_bytes), read_video),
    ]
    return {subject.name: subject for subject in listed}


def make_valid(folder: Path) -> None:
    """Writes all valid inputs, some seconds' work."""
    valid_inputs.make_models(folder)
    configs = folder / "multimodal-configs"
    configs.mkdir()
    for path in (folder / "multimodal").glob("*.json"):
        shutil.copy(path, configs)
    for name, files in (
        ("pictures", valid_inputs.pictures()),
        ("recordings", valid_inputs.recordings()),
    ):
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    (folder / "requests").mkdir()
    for file, data in valid_inputs.requests().items():
        (folder / "requests" / file).write_bytes(data)
    (folder / "batch").mkdir()
    for file, data in valid_inputs.batch().items():
        (folder / "batch" / file).write_bytes(data)
    (folder / "videos").mkdir()
    valid_inputs.videos(folder / "videos")
