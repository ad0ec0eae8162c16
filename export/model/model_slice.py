"""`Slice`: a smaller model inside one whose FFNs are nested: narrower FFNs, and layers left out.

As text, "ffn=8192x4,16384,8192x30/skip=20-24": a width for each layer that stays, and layers to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.model_family import TextConfig

Json = dict[str, Any]
Spans = tuple[range, ...]
MOST = 10_000  # of widths or layers in a text: far above any model, and low enough for a list
RUN = re.compile(r"([0-9]{1,9})(?:x([0-9]{1,4}))?")
SPAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass(frozen=True)
class Slice:
    """What is taken of a model.

    Attributes:
        widths: of the FFNs, one for each layer that stays; one for all of them; or none, to leave them.
        skipped: the layers that are left out, ascending.
        name: of a published slice.
        quality: what is published about it, for people and manifests: numbers, and their source.
    """

    widths: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    name: str | None = None
    quality: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.name:
            return self.name
        spans = [(span[0], span[-1]) for span in spans_of(self.skipped, 1)]
        skipped = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
        parts = {"ffn": _runs(self.widths), "skip": skipped}
        return "/".join(f"{key}={text}" for key, text in parts.items() if text)

    def record(self) -> Json:
        """What a manifest, and a sliced checkpoint, say of it."""
        published = {"published": dict(self.quality)} if self.quality else {}
        return {
            "name": self.name,
            "intermediate_size": list(self.widths),
            "skipped_layers": list(self.skipped),
            **published,
        }


@dataclass(frozen=True)
class Cut:
    """What a slice takes of one tensor: its new name, and spans of rows and columns (None: all of them)."""

    name: str
    rows: Spans | None = None
    columns: Spans | None = None

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The new shape of a tensor of shape `whole`."""
        cut = [size if spans is None else sum(map(len, spans)) for spans, size in
               zip((self.rows, self.columns), whole, strict=False)]  # fmt: skip
        return (*cut, *whole[2:])


class Slicing(Protocol):
    """How the models of a family are cut: a module of functions."""

    def resolve(self, config: TextConfig, wanted: Slice | str) -> Slice:
        """The slice of a name, or of widths and layers, with a width for every layer that stays.

        Raises:
            UsageError: the model has no such slice; the message says why.
        """

    def slices(self, config: TextConfig) -> list[Slice]:
        """What is published of this model's slices, and of itself as one of them; the best first."""

    def config_json(self, data: Json, config: TextConfig, chosen: Slice) -> Json:
        """The parsed config.json of a slice, from that of the whole model."""

    def cut(self, config: TextConfig, chosen: Slice, name: str) -> Cut | None:
        """What a slice takes of a tensor of the text model, used or not; None for nothing."""


def parse_slice(text: str) -> Slice | str:
    """A slice as text, or the name that it is.

    Raises:
        UsageError: neither.
    """
    if "=" not in text:
        return text
    found: dict[str, tuple[int, ...]] = {}
    read: dict[str, Callable[[str], tuple[int, ...]]] = {"ffn": parse_widths, "skip": parse_layers}
    for part in text.split("/"):
        key, _, value = part.partition("=")
        if key not in read or key in found:
            raise UsageError(f"slice {text!r}: expected a name, or ffn=WIDTHS/skip=LAYERS")
        found[key] = read[key](value)
    return Slice(found.get("ffn", ()), found.get("skip", ()))


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths such as "8192", or "8192x4,16384,8192x30": 4 layers of 8192, one of 16384, 30 of 8192.

    Raises:
        UsageError: anything else.
    """
    widths: list[int] = []
    for item in text.split(","):
        match = RUN.fullmatch(item.strip())
        count = int(match[2] or 1) if match else 0
        if match is None or not int(match[1]) or not count or len(widths) + count > MOST:
            raise UsageError(f"FFN widths {text!r}: expected numbers such as 8192 or 8192x4,16384,8192x30")
        widths += [int(match[1])] * count
    return tuple(widths)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers such as "20-24" or "3,20-24", ascending.

    Raises:
        UsageError: anything else, or a layer twice.
    """
    layers: list[int] = []
    for item in text.split(","):
        match = SPAN.fullmatch(item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(f"layers {text!r}: expected numbers such as 3 or 3,20-24")
        layers += range(first, last + 1)
    if len(set(layers)) != len(layers):
        raise UsageError(f"layers {text!r}: each once")
    return tuple(sorted(layers))


def spans_of(kept: Sequence[int], width: int) -> Spans:
    """The places of `kept` blocks of `width` each, neighbours together: ([0, 2, 3], 10) -> 0..10, 20..40."""
    spans: list[range] = []
    for block in kept:
        start, stop = block * width, (block + 1) * width
        if spans and spans[-1].stop == start:
            spans[-1] = range(spans[-1].start, stop)
        else:
            spans.append(range(start, stop))
    return tuple(spans)


def overlap(spans: Spans, start: int, stop: int) -> Spans:
    """The spans that hold elements start..stop of what `spans` take."""
    found, before = [], 0
    for span in spans:
        part = span[max(0, start - before) : max(0, stop - before)]
        before += len(span)
        if part:
            found.append(part)
    return tuple(found)


def _runs(widths: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    return ",".join(f"{width}x{count}" if count > 1 else str(width) for width, count in runs)
