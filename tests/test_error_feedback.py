"""Rounding with feedback: errors of a product cancel, and a weight goes up or down, never further."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.export.gate.weight_check import Calibrated, check_rounded
from gemma_edge.export.weights import error_feedback
from gemma_edge.export.weights.error_feedback import feedback_of, round_with_feedback
from gemma_edge.export.weights.quantize import Clip, ScaleForm, dequantize, quantize
from gemma_edge.runtime.errors import ParityError

Array = NDArray[Any]
FORMS = (ScaleForm(), ScaleForm("bfloat16", positive=True))
SHAPES = ((16, 64, 32), (40, 200, 64), (96, 256, 0))  # rows, columns, group


def correlated(tokens: int, columns: int, seed: int = 0) -> Array:
    """Inputs of few directions and much noise, as hidden states are."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, 8)) @ random.standard_normal((8, columns))
    return (x + 0.3 * random.standard_normal((tokens, columns))).astype(np.float32)


def weights_of(kind: str, rows: int, columns: int) -> Array:
    random = np.random.default_rng([rows, columns])
    normal = random.standard_normal((rows, columns))
    return {
        "normal": normal,
        "heavy": random.standard_t(3, (rows, columns)),
        "shifted": np.abs(normal) + 1,
        "ternary": random.choice([-1, 0, 1], (rows, columns)) * np.exp(normal[:, :1]),
        "sparse": normal * (random.random((rows, columns)) < 0.1),
        "zero": 0 * normal,
    }[kind].astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_the_product_cancel(shape: tuple[int, int, int], form: ScaleForm) -> None:
    rows, columns, group = shape
    w, x, unseen = weights_of("normal", rows, columns), correlated(400, columns), correlated(400, columns, 1)
    nearest = quantize(w, 4, group, "mse", form.type, form.positive)
    made = round_with_feedback(w, nearest, feedback_of(x, 0.1))
    errors = [((dequantize(one) - w) @ x.T) for one in (made, nearest)]
    assert np.square(errors[0]).sum() < 0.3 * np.square(errors[1]).sum()
    # Inputs of other directions do not suffer much.
    others = [np.square((dequantize(one) - w) @ unseen.T).sum() for one in (made, nearest)]
    assert others[0] < 2.5 * others[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "ternary", "sparse", "zero"])
def test_a_weight_is_rounded_up_or_down(kind: str, form: ScaleForm) -> None:
    for rows, columns, group in SHAPES:
        w = weights_of(kind, rows, columns)
        nearest = quantize(w, 4, group, "mse", form.type, form.positive)
        made = round_with_feedback(w, nearest, feedback_of(correlated(64, columns), 0.1))
        assert np.array_equal(made.scales, nearest.scales) and made.data.shape == nearest.data.shape
        steps = np.abs(np.repeat(made.scales, made.group, axis=1)[:, :columns])
        error, before = (np.abs(dequantize(one) - w) for one in (made, nearest))
        assert np.all(error <= np.maximum(steps, before) * 1.0001)


def test_uncorrelated_inputs_leave_the_nearest() -> None:
    w = weights_of("normal", 24, 96)
    nearest = quantize(w, 4, 32)
    for x in (3 * np.eye(96, dtype=np.float32), np.zeros((5, 96), np.float32)):
        made = round_with_feedback(w, nearest, feedback_of(x, 0.1))
        assert np.array_equal(made.data, nearest.data)


def test_it_is_ldlq() -> None:
    """Against the method written plainly, in float64, one column after the other."""
    w, x = weights_of("normal", 12, 80), correlated(300, 80)
    nearest = quantize(w, 4, 16)
    moments = x.T.astype(np.float64) @ x / len(x)
    order = np.argsort(-np.diag(moments), kind="stable")
    moments += 0.1 * np.mean(np.diag(moments)) * np.eye(80)
    # H = U D U^T, by elimination from the last column.
    rest, upper = moments[np.ix_(order, order)].copy(), np.eye(80)
    for k in range(79, -1, -1):
        upper[:k, k] = rest[:k, k] / rest[k, k]
        rest[:k, :k] -= np.outer(upper[:k, k], upper[:k, k]) * rest[k, k]
    scales = np.repeat(nearest.scales, 16, axis=1).astype(np.float64)
    values, errors = np.zeros((12, 80)), np.zeros((12, 80))
    for k, column in enumerate(order):
        exact = w[:, column] / scales[:, column]
        aim = (w[:, column] + errors[:, :k] @ upper[:k, k]) / scales[:, column]
        low, high = np.clip(np.floor(exact), -8, 7), np.clip(np.ceil(exact), -8, 7)
        values[:, column] = np.clip(np.rint(aim), low, high)
        errors[:, k] = w[:, column] - values[:, column] * scales[:, column]
    made = dequantize(round_with_feedback(w, nearest, feedback_of(x, 0.1)))
    # A weight right between two integers may go either way in float32.
    assert np.mean(np.isclose(made, values * scales, rtol=1e-4, atol=1e-5)) > 0.98


def test_wide_inputs_are_taken_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weights_of("normal", 8, 96), correlated(50, 96)
    monkeypatch.setattr(error_feedback, "SPAN", 32)
    found = feedback_of(x, 0.1)
    assert [(part.start, len(part.order)) for part in found] == [(0, 32), (32, 32), (64, 32)]
    made = round_with_feedback(w, quantize(w, 4, 32), found)
    alone = round_with_feedback(w[:, 32:64], quantize(w[:, 32:64], 4, 32), feedback_of(x[:, 32:64], 0.1))
    assert np.array_equal(made.data[:, 1:2], alone.data)


def test_only_4_bits() -> None:
    w = weights_of("normal", 4, 32)
    with pytest.raises(ValueError, match="4 bits"):
        round_with_feedback(w, quantize(w, 8, 32), feedback_of(correlated(9, 32), 0.1))


# What the gate says of it. ------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["mse", "none"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "ternary", "sparse", "zero"])
def test_the_gate_takes_what_is_sound(kind: str, clip: Clip) -> None:
    for (rows, columns, group), form in ((shape, form) for shape in SHAPES for form in FORMS):
        w = weights_of(kind, rows, columns)
        nearest = quantize(w, 4, group, clip, form.type, form.positive)
        made = round_with_feedback(w, nearest, feedback_of(correlated(100, columns), 0.1))
        check_rounded("it", dequantize(made), w, (4, made.group, clip), calibrated=Calibrated(made.scales))


@pytest.mark.parametrize("clip", ["mse", "none"])
@pytest.mark.parametrize("kind", ["normal", "shifted", "ternary"])
def test_the_gate_notices_two_percent(kind: str, clip: Clip) -> None:
    w = weights_of(kind, 64, 256)
    made = round_with_feedback(w, quantize(w, 4, 64, clip), feedback_of(correlated(100, 256), 0.1))
    for factor in (1.02, 1 / 1.02):
        got, scales = dequantize(made) * np.float32(factor), made.scales * np.float32(factor)
        with pytest.raises(ParityError, match=r"too (large|small)"):
            check_rounded("it", got, w, (4, 64, clip), calibrated=Calibrated(scales))


@pytest.mark.parametrize("change", ["rows", "sign", "pairs"])
def test_the_gate_notices_another_layout(change: str) -> None:
    w = weights_of("normal", 32, 128)
    made = round_with_feedback(w, quantize(w, 4, 64), feedback_of(correlated(100, 128), 0.1))
    got = dequantize(made)
    got = {"rows": got[::-1], "sign": -got, "pairs": got.reshape(32, -1, 2)[..., ::-1].reshape(32, 128)}[
        change
    ]
    with pytest.raises(ParityError, match="is off by"):
        check_rounded("it", got, w, (4, 64, "mse"), calibrated=Calibrated(made.scales))
