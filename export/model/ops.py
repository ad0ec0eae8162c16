"""`Ops`: the operations that the description of a model uses.

It holds what engines fuse (linear, RMS norm, attention over a cache, rotary embedding inside it) and the few
elementwise operations around them. An interpreter (NumPy, ONNX, TFLite) implements this protocol; the
architecture in `text.py` does not know which one evaluates it. `BaseOps` is what it has in common with the
encoders of images and audio, which add to it in `vision_ops.py` and `audio_ops.py`.

A value is whatever the interpreter calls a tensor: an array, or the name of a graph edge. The description
thinks of hidden states as `(tokens, width)` and of the AltUp streams as `(tokens, streams, width)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Weight:
    """A reference to a checkpoint tensor, to rows [start, stop) of it, or to it times a factor.

    Nothing is loaded until an interpreter uses it.
    """

    name: str
    rows: tuple[int, int] | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class HeadProjection:
    """A linear projection into heads, each RMS-normalized (without weight where `norm` is None)."""

    weight: Weight
    bias: Weight | None
    norm: Weight | None
    heads: int


@dataclass(frozen=True)
class Weights:
    """Names below one module: `Weights("layers.3.")["mlp.gate_proj"]` is layers.3.mlp.gate_proj.weight."""

    prefix: str = ""

    def __getitem__(self, name: str) -> Weight:
        return Weight(f"{self.prefix}{name}.weight")

    def raw(self, name: str) -> Weight:
        """A tensor whose name does not end in `.weight`."""
        return Weight(self.prefix + name)

    def layer(self, index: int) -> Weights:
        return Weights(f"{self.prefix}layers.{index}.")


class BaseOps(Protocol[T]):
    """What every interpreter can do. Operations work on the last axis; those before it are rows."""

    def linear(self, x: T, weight: Weight, bias: Weight | None = None) -> T:
        """x @ weight.T (+ bias): (..., in) -> (..., out)."""

    def rms_norm(self, x: T, weight: Weight | None, groups: int = 1) -> T:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, or over `groups` equal parts of it."""

    def add(self, a: T, b: T) -> T: ...
    def subtract(self, a: T, b: T) -> T: ...
    def multiply(self, a: T, b: T) -> T: ...
    def divide(self, a: T, b: T) -> T: ...
    def scale(self, x: T, factor: float) -> T: ...
    def scale_by(self, x: T, weight: Weight) -> T:
        """Elementwise product with a vector of the checkpoint."""

    def tanh(self, x: T) -> T: ...
    def relu(self, x: T) -> T: ...
    def activation(self, x: T, name: str) -> T:
        """`name` as in transformers: gelu_pytorch_tanh, gelu, silu, relu."""

    def mean(self, x: T) -> T:
        """Mean over the last axis, which stays with length 1."""

    def mean_square(self, x: T) -> T:
        """Mean of squares over the last axis, which stays with length 1."""

    def sqrt(self, x: T) -> T: ...
    def at_least(self, x: T, minimum: float) -> T: ...
    def columns(self, x: T, start: int, stop: int) -> T: ...


class Ops(BaseOps[T], Protocol[T]):
    """What the text model needs. Shapes are (tokens, width) unless said otherwise."""

    def project_heads(self, x: T, projections: list[HeadProjection]) -> T:
        """Projections of x side by side: (tokens, in) -> (tokens, sum of heads * head_dim)."""

    def attention(self, heads: T, layer: int) -> T:
        """Causal attention of `layer` with its cache, after rotating queries and keys by their positions.

        `heads` holds queries, keys and values, (tokens, (heads + 2 kv_heads) * head_dim), or, in a layer that
        shares KV and reads its owner's cache, queries alone. The scale is 1.0.
        """

    def wanted(self, x: T) -> T:
        """Rows whose logits are wanted: what comes after has only those. Keys and values are not affected."""

    # AltUp streams: (tokens, streams, width). -----------------------------------------------------

    def stack(self, xs: list[T]) -> T:
        """(tokens, width) each -> (tokens, streams, width)."""

    def stream(self, x: T, index: int) -> T:
        """(tokens, streams, width) -> (tokens, width)."""

    def mix(self, coefficients: T, streams: T) -> T:
        """(tokens, S * S) x (tokens, S, width): new stream i = old i + sum over j of c[i, j] * old j."""

    def spread(self, coefficients: T, x: T, streams: T) -> T:
        """streams + (1 + coefficients) x: (tokens, S) and (tokens, width) onto (tokens, S, width)."""

    def add_to_tail(self, streams: T, x: T) -> T:
        """Adds (tokens, width) to every stream but the first."""
