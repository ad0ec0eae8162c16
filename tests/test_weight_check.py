"""The gate's check of stored weights: every seeded defect is named, and no sound tensor is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.gate.weight_check import check_exact, check_rounded, check_weights
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME
from gemma_edge.export.weights.quantize import Clip, ScaleType, dequantize, quantize
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import ParityError

Array = NDArray[Any]
FORMATS = ("onnx", "tflite", "litertlm")
UP, GATE = "layers.{}.mlp.up_proj.weight", "layers.{}.mlp.gate_proj.weight"


@pytest.fixture(params=FORMATS)
def bundle(request: pytest.FixtureRequest, gate_bundles: dict[str, Path]) -> Bundle:
    return Bundle.open(gate_bundles[request.param])


@dataclass
class Altered:
    """A checkpoint, some of whose tensors are altered: a bundle made of the sound one has the defect then."""

    checkpoint: Checkpoint
    changes: dict[str, Callable[[Array], Array]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def read(self, name: str) -> Array:
        whole = self.checkpoint.read(name)
        return self.changes[name](whole) if name in self.changes else whole

    def rows(self, name: str, start: int, stop: int) -> Array:
        if name in self.changes:
            return self.read(name)[start:stop]
        return self.checkpoint.rows(name, start, stop)


def check(bundle: Bundle, source: Path, changes: dict[str, Callable[[Array], Array]]) -> Any:
    with Checkpoint.open(source) as checkpoint:
        return check_weights(bundle, Altered(checkpoint, changes))  # type: ignore[arg-type]


def another(source: Path, name: str) -> Callable[[Array], Array]:
    with Checkpoint.open(source) as checkpoint:
        weight = checkpoint.read(name)
    return lambda _: weight


@pytest.mark.slow
def test_sound_weights_pass(bundle: Bundle, gate_source: Path) -> None:
    found = check(bundle, gate_source, {})
    assert found.tensors > 80 and 0.001 < found.relative_error < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        # Scales that are 2 % off, of 4 bits and of 8.
        (UP.format(2), lambda w: w * 1.02, "all are 2.0% too small"),
        ("layers.4.self_attn.k_proj.weight", lambda w: w, ""),  # shared: not stored
        ("layers.2.self_attn.k_proj.weight", lambda w: w / 1.02, "q_proj.weight.heads from row 128"),
        ("layers.1.per_layer_input_gate.weight", lambda w: w * 1.02, "per_layer_input_gate"),
        # Vectors, one of them folded into a factor, one among the norms of heads.
        ("layers.1.input_layernorm.weight", lambda w: w * 1.02, "the checkpoint's"),
        ("layers.0.altup.router_norm.weight", lambda w: w * 1.001, "router_norm"),
        ("layers.0.self_attn.k_norm.weight", lambda w: w[::-1], "norms"),
        # Layout.
        (UP.format(1), lambda w: w[::-1], "is off by"),
        (UP.format(1), lambda w: -w, "is off by"),
        (UP.format(1), lambda w: w.reshape(len(w), -1, 2)[..., ::-1].reshape(w.shape), "is off by"),
        (UP.format(1), lambda w: np.where(np.arange(len(w))[:, None] == 77, np.roll(w, 1, 1), w), "row +77"),
        # Tables.
        (PLE_NAME, lambda w: np.roll(w, 32, axis=1), "table per_layer"),
        (PLE_NAME, lambda w: np.roll(w, 1, axis=0), "table per_layer"),
        (PLE_NAME, lambda w: w * 1.02, "table per_layer"),
        (EMBEDDING_NAME, lambda w: np.roll(w, 1, axis=0), "table embedding"),
    ],
)  # fmt: skip
def test_a_defect_is_named(
    bundle: Bundle, gate_source: Path, name: str, change: Callable[[Array], Array], said: str
) -> None:
    if not said:
        assert check(bundle, gate_source, {name: change})
        return
    with pytest.raises(ParityError) as caught:
        check(bundle, gate_source, {name: change})
    assert said in str(caught.value) and "the stored weights are not the checkpoint's" in str(caught.value)


@pytest.mark.slow
def test_the_weights_of_two_layers_exchanged(bundle: Bundle, gate_source: Path) -> None:
    names = GATE.format(1), GATE.format(2)
    with pytest.raises(ParityError, match=r"layers\.1\.mlp\.gate_proj"):
        check(bundle, gate_source, {a: another(gate_source, b) for a, b in (names, names[::-1])})


# Bounds. ------------------------------------------------------------------------------------------


def weights(kind: str, shape: tuple[int, int], seed: int) -> Array:
    random = np.random.default_rng([seed, *shape])
    normal = random.standard_normal(shape)
    return {
        "normal": normal,
        "heavy": random.standard_t(2, shape),
        "uniform": random.uniform(-1, 1, shape),
        "sparse": normal * (random.random(shape) < 0.1),
        "shifted": np.abs(normal) + 1,
        "ternary": random.choice([-1, 0, 1], shape) * np.exp(random.standard_normal((shape[0], 1))),
        "tiny": normal * 1e-6,
        "zero": 0 * normal,
    }[kind].astype(np.float32)


KINDS = ("normal", "heavy", "uniform", "sparse", "shifted", "ternary", "tiny", "zero")
SHAPES = ((1, 16), (3, 100), (64, 24), (128, 512))


@pytest.mark.parametrize("clip", ["mse", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sound_tensor_is_refused(kind: str, clip: Clip) -> None:
    types: tuple[tuple[ScaleType, bool], ...] = (("float32", False), ("float16", False), ("bfloat16", True))
    for shape, bits, group, (scale, positive) in itertools.product(SHAPES, (4, 8), (16, 64, 0), types):
        w = weights(kind, shape, bits)
        made = quantize(w, bits, group, clip, scale, positive)
        check_rounded("it", dequantize(made), w, (bits, made.group, clip))


@pytest.mark.parametrize("clip", ["mse", "none"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "shifted", "ternary"])
def test_two_percent_are_noticed(kind: str, bits: int, clip: Clip) -> None:
    """In every tensor of some hundred weights or more, in groups as recipes have them."""
    if (kind, bits, clip) == ("heavy", 4, "none"):
        pytest.skip("some weights are hundreds of steps long, most are none: no slope to speak of")
    w = weights(kind, (128, 512), 0)
    made = dequantize(quantize(w, bits, 64, clip))
    for factor in (1.02, 1 / 1.02):
        with pytest.raises(ParityError):
            check_rounded("it", made * np.float32(factor), w, (bits, 64, clip))


def test_numbers_that_are_none_are_noticed() -> None:
    w = weights("normal", (4, 64), 0)
    for poison in (np.nan, np.inf):
        got = w.copy()
        got[2, 5] = poison
        with pytest.raises(ParityError):
            check_exact("it", got.reshape(-1), w.reshape(-1))
        with pytest.raises(ParityError):
            check_rounded("it", got, w, (8, 64, "mse"))
