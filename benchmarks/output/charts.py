"""Charts as SVG text, for a page without a network: bars, areas over time, histograms, lines.

Colours are classes (`s0` to `s5` for series), which the page's style sheet gives for light and for dark.
Every mark has a `<title>`, which browsers show under the pointer. Numbers in, one `<svg>` element out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 760, 340  # units of a chart; on a page they are pixels at most
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 34  # margins of charts with two axes
Format = Callable[[float], str]


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its value, standard deviation and single samples; `series` is a colour.

    `more` is what lies on top of the value, drawn in a paler tone; `group` sets a bar off from the one above.
    `shown` is the value for people; by default about three digits.
    """

    label: str
    value: float
    sd: float = 0.0
    samples: tuple[float, ...] = ()
    series: int = 0
    more: float = 0.0
    group: bool = False
    shown: str = ""


@dataclass(frozen=True)
class Layer:
    """One layer of an area chart, or one line: a name and a value for each x."""

    name: str
    values: Sequence[float]
    series: int = 0


@dataclass(frozen=True)
class Mark:
    """A line across a chart at a value, with its label."""

    label: str
    value: float


def ticks(top: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to the first that is not below `top`: steps of 1, 2 or 5 times a power of ten."""
    if not math.isfinite(top) or top <= 0:
        return [0.0, 1.0]
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: float) -> str:
    """About three digits: "1234", "85.1", "0.42"."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def plus_minus(value: float, sd: float) -> str:
    """A mean and its standard deviation, with decimals for two digits of the latter: "0.240 ± 0.079"."""
    if not sd:
        return number(value)
    decimals = max(0, min(6, 1 - math.floor(math.log10(sd))))
    return f"{value:.{decimals}f} ± {sd:.{decimals}f}"


def bar_chart(bars: Sequence[Bar], unit: str, marks: Sequence[Mark] = (), *, width: int = WIDE) -> str:
    """Horizontal bars with their labels, whiskers of one standard deviation and a dot a sample.

    Labels stand beside the bars, or above them in a narrow chart. `marks` are upright lines through all bars,
    their labels above.
    """
    beside = width >= WIDE
    label_width, value_width = (290, 120) if beside else (0, 126)
    row, gap, lift, above = (30, 12, 0, 18 if marks else 0) if beside else (46, 10, 18, 18 if marks else 0)
    ends = [max(bar.value + max(bar.sd, bar.more), *bar.samples, 0.0) for bar in bars]
    scale_to = max([*ends, *(mark.value for mark in marks)], default=0.0) or 1.0
    plot = width - label_width - value_width
    tops = [
        above + i * row + 6 + lift + gap * sum(bar.group for bar in bars[: i + 1]) for i in range(len(bars))
    ]
    height = max(tops, default=above) + (row - lift) - 2

    def x(value: float) -> float:
        return label_width + value / scale_to * plot

    parts = []
    for mark in marks:
        at = _n(x(mark.value))
        parts.append(f'<path class="mark" d="M{at} {above - 2}V{height}"/>')
        parts.append(
            f'<text class="marklabel" text-anchor="middle" x="{at}" y="12">{escape(mark.label)}</text>'
        )
    for bar, end, y in zip(bars, ends, tops, strict=True):
        spread = f" ± {number(bar.sd)}" if bar.sd else f" + {number(bar.more)}" if bar.more else ""
        text = bar.shown or f"{number(bar.value)}{spread}"
        samples = f"; samples: {', '.join(map(number, bar.samples))}" if bar.samples else ""
        tip = escape(f"{bar.label}: {text} {unit}{samples}")
        place = f'x="{label_width - 10}" y="{y + 13}"' if beside else f'x="0" y="{y - 5}" text-anchor="start"'
        look = "label" if beside else "label above"
        parts.append(f'<g><title>{tip}</title><text class="{look}" {place}>')
        parts.append(f"{escape(shorten(bar.label, 44 if beside else 50))}</text>")
        parts.append(
            f'<rect class="s{bar.series}" x="{label_width}" y="{y}" width="{_n(x(bar.value) - label_width)}" '
            f'height="18" rx="2"/>'
        )
        if bar.more:
            parts.append(
                f'<rect class="s{bar.series} pale" x="{_n(x(bar.value))}" y="{y}" '
                f'width="{_n(x(bar.value + bar.more) - x(bar.value))}" height="18" rx="2"/>'
            )
        if bar.sd:
            low, high = x(max(0.0, bar.value - bar.sd)), x(bar.value + bar.sd)
            parts.append(f'<path class="whisker" d="M{_n(low)} {y + 9}H{_n(high)}"/>')
        parts += [f'<circle class="dot" cx="{_n(x(s))}" cy="{y + 9}" r="2"/>' for s in bar.samples]
        parts.append(f'<text class="value" x="{_n(x(end) + 8)}" y="{y + 13}">{text}</text></g>')
    return _svg(width, height, parts, f"bar chart, {unit}")


def picture(chart: str, title: str, note: str, style: str) -> str:
    """A chart as an SVG file of its own: on a card with its title and a note, with its style sheet."""
    box = re.search(r'viewBox="0 0 \S+ ([\d.]+)"', chart)
    if box is None:
        raise ValueError("not a chart of this module")
    height = float(box[1])
    inner = chart.replace("<svg ", f'<svg x="20" y="58" width="{WIDE}" height="{_n(height)}" ', 1)
    width, whole = WIDE + 40, _n(height + 74)
    size = f'width="{width}" height="{whole}" viewBox="0 0 {width} {whole}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">\n'
        f"<style>{style}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{_n(height + 73)}" rx="8"/>\n'
        f'<text class="title" x="20" y="26">{escape(title)}</text>\n'
        f'<text class="value" x="20" y="45">{escape(note)}</text>\n'
        f"{inner}\n</svg>\n"
    )


def area_chart(
    xs: Sequence[float],
    layers: Sequence[Layer],
    *,
    y_format: Format,
    x_unit: str,
    marks: Sequence[Mark] = (),
    bands: Sequence[tuple[str, float, float]] = (),
    width: int = WIDE,
) -> str:
    """Layers stacked over x, lines across at `marks`, and the x ranges of `bands` named below."""
    totals = [sum(column) for column in zip(*(layer.values for layer in layers), strict=True)]
    axes = _Axes(xs, max([*totals, *(mark.value for mark in marks)]), width, 260, y_format, x_unit)
    parts = [axes.grid()]
    for i, (name, start, end) in enumerate(bands):
        left, right = axes.x(start), axes.x(end)
        parts.append(
            f'<rect class="band{i % 2}" x="{_n(left)}" y="{TOP}" width="{_n(max(0.0, right - left))}" '
            f'height="{axes.height - TOP - BOTTOM}">'
            f"<title>{escape(name)}: {number(end - start)} {x_unit}</title></rect>"
        )
        if right - left > 7 * len(name):
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{_n((left + right) / 2)}" y="{TOP + 12}">'
                f"{escape(name)}</text>"
            )
    below = [0.0] * len(xs)
    for layer in layers:
        above = [low + value for low, value in zip(below, layer.values, strict=True)]
        outline = [f"{_n(axes.x(a))} {_n(axes.y(b))}" for a, b in zip(xs, above, strict=True)]
        back = [f"{_n(axes.x(a))} {_n(axes.y(b))}" for a, b in zip(xs, below, strict=True)][::-1]
        peak = y_format(max(layer.values))
        parts.append(
            f'<path class="area s{layer.series}" d="M{"L".join(outline + back)}Z">'
            f"<title>{escape(layer.name)}: at most {peak}</title></path>"
        )
        below = above
    parts += [axes.mark(mark) for mark in marks]
    return _svg(width, axes.height, parts, "memory over time")


def line_chart(
    xs: Sequence[float], layers: Sequence[Layer], *, y_format: Format, x_unit: str, width: int = WIDE
) -> str:
    """Lines over x from zero."""
    axes = _Axes(xs, max(max(layer.values) for layer in layers), width, 220, y_format, x_unit)
    parts = [axes.grid()]
    for layer in layers:
        points = [f"{_n(axes.x(a))} {_n(axes.y(b))}" for a, b in zip(xs, layer.values, strict=True)]
        parts.append(
            f'<path class="line s{layer.series}" d="M{"L".join(points)}">'
            f"<title>{escape(layer.name)}</title></path>"
        )
    return _svg(width, axes.height, parts, ", ".join(layer.name for layer in layers))


def histogram(
    values: Sequence[float], marks: Sequence[Mark], *, x_unit: str, bins: int = 40, width: int = WIDE
) -> str:
    """How often each range of values occurs; the highest bin's count is the axis, `marks` are upright
    lines.
    """
    low, high = min(values), max(values)
    step = (high - low) / bins or max(high, 1e-9) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    # Labels of marks stand above the bars, a line each: marks may be close together.
    top = TOP + 15 * len(marks)
    axes = _Axes([low, low + step * bins], max(counts), width, 205 + top, number, x_unit, top=top)
    parts = [axes.grid()]
    for i, count in enumerate(counts):
        if count:
            left, right = axes.x(low + i * step), axes.x(low + (i + 1) * step)
            tip = f"{number(low + i * step)} to {number(low + (i + 1) * step)} {x_unit}: {count}"
            parts.append(
                f'<rect class="s0" x="{_n(left + 0.5)}" y="{_n(axes.y(count))}" '
                f'width="{_n(right - left - 1)}" height="{_n(axes.y(0) - axes.y(count))}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    for i, mark in enumerate(marks):
        at, y = axes.x(mark.value), TOP + 15 * i
        anchor, shift = ("end", -5) if at > width - 110 else ("start", 5)
        parts.append(f'<path class="mark" d="M{_n(at)} {y - 8}V{axes.height - BOTTOM}"/>')
        parts.append(
            f'<text class="marklabel" text-anchor="{anchor}" x="{_n(at + shift)}" y="{y}">'
            f"{escape(mark.label)}</text>"
        )
    return _svg(width, axes.height, parts, f"histogram, {x_unit}")


class _Axes:
    """Scales and the grid of a chart with two axes; y begins at zero, x at its smallest value."""

    def __init__(
        self,
        xs: Sequence[float],
        highest: float,
        width: int,
        height: int,
        y_format: Format,
        x_unit: str,
        *,
        top: int = TOP,
    ) -> None:
        self.width, self.height, self.top = width, height, top
        self.y_format, self.x_unit = y_format, x_unit
        self.low, self.high = min(xs), max(xs)
        self.y_ticks = ticks(highest, 4)

    def x(self, value: float) -> float:
        return LEFT + (value - self.low) / ((self.high - self.low) or 1.0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - value / self.y_ticks[-1] * (self.height - self.top - BOTTOM)

    def grid(self) -> str:
        parts = []
        for value in self.y_ticks:
            y = _n(self.y(value))
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{self.width - RIGHT}"/>')
            parts.append(
                f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{_n(self.y(value) + 4)}">'
                f"{escape(self.y_format(value))}</text>"
            )
        step = ticks(self.high - self.low, 6 if self.width >= WIDE else 4)[1]
        value = math.ceil(self.low / step - 1e-9) * step
        while value <= self.high + step * 1e-9:
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{_n(self.x(value))}" y="{self.height - 14}">'
                f"{number(value)}</text>"
            )
            value += step
        parts.append(
            f'<text class="tick" text-anchor="end" x="{self.width - RIGHT}" y="{self.height - 1}">'
            f"{escape(self.x_unit)}</text>"
        )
        return "".join(parts)

    def mark(self, mark: Mark) -> str:
        y = self.y(mark.value)
        return (
            f'<path class="mark" d="M{LEFT} {_n(y)}H{self.width - RIGHT}"/>'
            f'<text class="marklabel" text-anchor="end" x="{self.width - RIGHT}" y="{_n(y - 5)}">'
            f"{escape(mark.label)}</text>"
        )


def shorten(text: str, most: int = 44) -> str:
    """The text, its middle left out when it is too long for a label."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _n(value: float) -> str:
    """A coordinate: a tenth of a pixel is fine enough, and short."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(width: int, height: float, parts: Sequence[str], label: str) -> str:
    box = f'viewBox="0 0 {width} {_n(height)}" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"
