"""Speculation on real engines: the logits of every token are those of plain decoding, within rounding.

The tokens are forced, so that drafts are accepted and refused whatever the weights and the CPU are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.formats.tflite import litert_facts
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.generate import TokenGenerator
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.model_parts import bundle_costs
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.speculation.cost_curve import CostCurve, MachineCosts
from gemma_edge.runtime.usage import GenerationProgress
from support.margins import FP32, int8_activations
from support.pictures import painting

CHEAP = CostCurve({2: 1.1, 16: 2.5})


class Forced(Sampler):
    """Picks the tokens of a script, and keeps the logits that it could have picked from."""

    def __init__(self, script: Sequence[int]) -> None:
        super().__init__(Sampling(temperature=0.0))
        self.script, self.logits = iter(script), []

    def pick(self, logits: NDArray[np.float32], history: Collection[int] = ()) -> int:
        self.logits.append(logits.copy())
        return next(self.script)


def forced(model: Model, prompt: Sequence[int], script: Sequence[int], speculate: bool) -> Any:
    """The logits (tokens, V) that a script's tokens stand for, and the progress."""
    made = TokenGenerator(model.residency, model.embeddings, model.per_layer, costs=MachineCosts(curve=CHEAP))
    made.reset()
    sampler, progress = Forced(script), GenerationProgress()
    tokens = made.stream_tokens(
        prompt, sampler, max_tokens=len(script), speculate=speculate, progress=progress
    )
    assert list(tokens) == list(script)
    assert model.decoder.position == len(prompt) + len(script) - 1
    return np.stack(sampler.logits), progress


def edited(prompt: Sequence[int], count: int) -> list[int]:
    """The prompt again, but for one token in 13."""
    return [token if i % 13 else 5 + i % 7 for i, token in enumerate(prompt[1 : count + 1], 1)]


@pytest.fixture(
    scope="module",
    params=["onnx-fp32", "onnx-int4", "onnx-int8 cache", "tflite-fp32", "tflite-int4", "litertlm-int4_g32"],
)
def model(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """The tiny checkpoint, whose window is 32, at a context of 160."""
    form, _, recipe = request.param.partition("-")
    pytest.importorskip({"onnx": "onnxruntime"}.get(form, "ai_edge_litert"))
    out = tmp_path_factory.mktemp("bundle") / f"out{ARTIFACT_FORMATS[form].suffix}"
    options: dict[str, Any] = {"recipe": recipe.removesuffix(" cache"), "context": 160, "chunk": 32}
    options |= {"verify": False, "calibrate": "none"}
    if recipe.endswith(" cache"):
        options["kv_cache"] = "int8"
    with Model.load(export_bundle(tiny_checkpoint, out, format=form, **options).path, threads=1) as made:
        yield made


def error_of(model: Model, logits: NDArray[np.float32]) -> float:
    """How far logits may be from those of other calls."""
    assert model.bundle
    exact = model.bundle.manifest["recipe"]["name"] == "fp32" and model.bundle.kv_cache == "fp32"
    return FP32 if exact else int8_activations(logits)


def test_every_token_has_the_logits_of_plain_decoding(model: Model) -> None:
    """Through windows that move on, with drafts that are accepted, cut and refused."""
    rng = np.random.default_rng(3)
    prompt = [2, *rng.integers(10, model.tokenizer.vocab_size - 10, 60).tolist()]
    script = edited(prompt, 59) + edited(prompt, 30)
    plain, _ = forced(model, prompt, script, speculate=False)
    got, progress = forced(model, prompt, script, speculate=True)
    assert progress.accepted_tokens > 30 and progress.drafted_tokens > progress.accepted_tokens
    assert np.abs(got - plain).max() <= error_of(model, plain)


def test_a_context_fills_to_its_last_place(model: Model) -> None:
    prompt = [2, *([20, 21, 22, 23, 24] * 31)][:152]
    script = [prompt[len(prompt) - 5 + i % 5] for i in range(8)]
    plain, _ = forced(model, prompt, script, speculate=False)
    got, progress = forced(model, prompt, script, speculate=True)
    assert progress.accepted_tokens > 0
    assert np.abs(got - plain).max() <= error_of(model, plain)


def test_what_was_drafted_in_vain_leaves_no_trace(model: Model) -> None:
    """A snapshot behind an answer with refused drafts goes on as plain decoding does."""
    rng = np.random.default_rng(4)
    prompt = [2, *rng.integers(10, model.tokenizer.vocab_size - 10, 50).tolist()]
    script = edited(prompt, 40)
    behind = []
    for speculate in (False, True):
        forced(model, prompt, script, speculate)
        model.decoder.restore(model.decoder.snapshot())
        ids = np.array([30, 31, 32])
        tables = model.embeddings, model.per_layer
        rows = [model.decoder.forward(*(table.lookup(i) for table in tables)) for i in ids[:, None]]
        behind.append(np.concatenate(rows))
    assert np.abs(behind[0] - behind[1]).max() <= error_of(model, behind[0])


def test_cancelling_in_a_draft_and_asking_on(model: Model) -> None:
    prompt = [2, *([20, 21, 22, 23, 24, 25, 26] * 9)]
    made = TokenGenerator(model.residency, model.embeddings, model.per_layer, costs=MachineCosts(curve=CHEAP))
    made.reset()
    script = prompt[1:40]
    stream = made.stream_tokens(prompt, Forced(script), speculate=True)
    taken = [next(stream)]
    while model.decoder.position <= len(prompt) + len(taken):  # until a draft is under way
        taken.append(next(stream))
    ahead = model.decoder.position
    stream.close()
    assert model.decoder.position == len(prompt) + len(taken) - 1 < ahead
    progress = GenerationProgress()
    longer, after = [*prompt, *taken, 40], Forced([50])
    assert list(made.stream_tokens(longer, after, max_tokens=1, progress=progress)) == [50]
    assert progress.cached_tokens == len(longer) - 2
    fresh, _ = forced(model, longer, [50], speculate=False)
    assert np.abs(after.logits[0] - fresh[0]).max() <= error_of(model, fresh)


def test_the_machine_is_measured_and_remembered(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    assert model.bundle
    costs = bundle_costs(model.bundle, 1)
    made = TokenGenerator(model.residency, model.embeddings, model.per_layer, costs=costs)
    prompt = [2, *([20, 21, 22, 23, 24] * 6)]
    script = (prompt[1:] * 3)[:70]
    list(made.stream_tokens(prompt, Forced(script), max_tokens=70, speculate=True))
    measured = costs.curve
    assert measured and measured.of(max(model.decoder.verify_rows)) >= 1
    again = bundle_costs(model.bundle, 1).curve
    assert again and again.to_json() == measured.to_json()
    assert bundle_costs(model.bundle, 2).curve is None  # other threads


def test_a_picture_in_the_prompt(pocket_bundles: dict[str, Path]) -> None:
    """Soft tokens are neither matched nor drafted; the answer is one of plain decoding."""
    pytest.importorskip("PIL")
    said = "Repeat: the red box is in the blue hall and the red box is in the blue hall"
    with Model.load(pocket_bundles["onnx"], threads=1) as model:
        image = painting(96, 96)
        prompt = model.prompt_for(said, attach=[image])
        words = model.tokenizer.encode("the red box is in the blue hall and the red box", bos=False)
        rows = []
        for speculate in (False, True):
            model.reset()
            sampler, progress = Forced(words), GenerationProgress()
            made = model._generator
            made.costs = MachineCosts(curve=CHEAP)
            got = made.stream_tokens(
                prompt, sampler, max_tokens=len(words), speculate=speculate, progress=progress
            )
            assert list(got) == words
            rows.append(np.stack(sampler.logits))
        assert progress.accepted_tokens > 4 and progress.soft_tokens > 4
        assert np.abs(rows[0] - rows[1]).max() <= int8_activations(rows[0])


@pytest.mark.parametrize("form", ["tflite", "litertlm"])
def test_a_bundle_without_signatures_for_it_decodes_plainly(
    form: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bundles of earlier versions do."""
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(litert_facts, "VERIFY_ROWS", ())
    out = tmp_path / f"out{ARTIFACT_FORMATS[form].suffix}"
    options: dict[str, Any] = {"recipe": "int8", "context": 160, "chunk": 32, "verify": False}
    path = export_bundle(tiny_checkpoint, out, format=form, **options).path
    with Model.load(path, threads=1) as model:
        assert list(model.decoder.verify_rows) == []
        prompt = [2, *([20, 21, 22, 23, 24] * 6)]
        _, progress = forced(model, prompt, prompt[1:20], speculate=True)
        assert progress.drafted_tokens == 0
