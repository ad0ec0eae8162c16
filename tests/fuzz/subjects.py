"""What a campaign runs: for each kind of file, how it is damaged and what then reads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

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
from .readers import (
    answer,
    answer_single_file,
    convert_tokenizer,
    inspect_bundle,
    models,
    open_bundle,
    quantize_checkpoint,
    read_batch,
    read_checkpoint,
    read_config,
    read_layout,
    read_model_file,
    read_picture,
    read_prefix,
    read_recipe,
    read_recording,
    read_request,
    read_results,
    read_session,
    read_side_files,
    read_single_file,
    read_table,
    read_tokenizer,
    read_video,
    render,
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
