"""What reads the files of a case: all that a user's command would do with them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import valid_inputs

MODELS = "GEMMA_EDGE_FUZZ_MODELS"
MESSAGES = [
    {"role": "user", "content": "the thing"},
    {"role": "assistant", "content": "in"},
    {"role": "user", "content": "x"},
]


def models() -> Path:
    """Where `make_valid` wrote: the campaign sets it before it forks."""
    return Path(os.environ[MODELS])


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
    export_bundle(
        folder, target, recipe="int4", context=64, chunk=32, verify=False, format=form, calibrate="none"
    )


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
def small_model() -> Any:
    from gemma_edge.runtime.model import Model

    return Model.load(models() / "onnx", threads=1)


def read_session(folder: Path) -> None:
    from gemma_edge.runtime.conversations.conversation import Conversation

    options = {"max_tokens": 2, "temperature": 0}
    conversation = Conversation.load(
        small_model(), folder / "x.session", overflow="drop-oldest", options=options
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
    cache = PromptCache(small_model().decoder, files=PrefixFiles(valid_inputs.PREFIX_OF, 1 << 30, least=4))
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
            small_model().generate(line.request.prompt, stream=True, **line.request.options).cancel()
    shutil.copy(folder / "answers.jsonl", folder / "copy.jsonl")
    with AnswersFile(folder / "copy.jsonl") as answers:
        answers.append({"line": 1, "key": ""})


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
    small_model().prompt_for(asked.prompt, **options)


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
