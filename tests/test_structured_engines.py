"""Forms and tools on Pocket, in both engines: answers are valid whatever the model would rather say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.checkpoint.sentencepiece_model import GEMMA_PIECES, build_model, synthetic_pieces
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.answer_form import schema_grammar
from gemma_edge.runtime.prompt.grammar_constraint import Grammars
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, Convention
from support.odd_schemas import ODD_SCHEMAS
from support.repository import ROOT

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
# Of each schema. 20 make 1,000 answers per engine, which take minutes.
ANSWERS = int(os.environ.get("GEMMA_EDGE_ANSWERS", "1"))
RECIPES = {"onnx": "int4", "tflite": "int4_g32"}


@pytest.fixture(scope="module", params=RECIPES)
def pocket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    out = tmp_path_factory.mktemp("pocket") / request.param
    export_bundle(
        ROOT / "pocket/checkpoint",
        out,
        recipe=RECIPES[request.param],
        context=512,
        format=request.param,
        modalities=("text",),
        verify=False,
        calibrate="none",
    )
    with Model.load(out) as model:
        yield model


def test_every_answer_at_temperature_2_fits_its_schema(pocket: Model) -> None:
    valid = 0
    for number, schema in enumerate(ODD_SCHEMAS):
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        for seed in range(ANSWERS):
            answer = pocket.generate(
                f"Example {seed}", response_format=form, temperature=2.0, top_k=0, top_p=1.0, seed=seed
            )
            assert answer.finish_reason == "stop", (number, seed, answer.text)
            validator.validate(json.loads(answer.text))
            valid += 1
    assert valid == 50 * ANSWERS


def get_weather(city: str, days: int = 1) -> None:
    """Tells the weather."""


def now() -> None:
    """Tells the time."""


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_call_that_is_required_is_made(pocket: Model, convention: Convention) -> None:
    options: dict[str, Any] = {
        "tools": [get_weather, now],
        "tool_convention": convention,
        "temperature": 1.0,
        "max_tokens": 200,
    }
    for seed in range(3):
        answer = pocket.generate("What time is it?", tool_choice="now", seed=seed, **options)
        assert [(call.name, call.arguments, call.error) for call in answer.tool_calls] == [("now", {}, None)]
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")
        stream = pocket.generate("What time is it?", tool_choice="now", seed=seed, stream=True, **options)
        assert list(stream) == [] and stream.completion.tool_calls == answer.tool_calls


def test_a_vocabulary_of_true_size(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(build_model(synthetic_pieces(GEMMA_PIECES)))
    tokenizer = Tokenizer(path)
    constraint = Grammars(tokenizer, (1, 106)).constraint(schema_grammar({"enum": ["thé", 12]}, "schema"))
    for token in tokenizer.encode('"thé"', bos=False):
        allowed = constraint.allowed()
        assert allowed.shape == (GEMMA_PIECES,) and allowed[token] and not allowed[106]
        constraint.accept(token)
    assert constraint.allowed()[106]
