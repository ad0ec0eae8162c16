"""Draws the app's screens in a browser: a stand-in that reads the same layouts, colours, styles and texts.

    draw_screens.py FOLDER [--dark] [--font-scale 1.3]    writes NAME.html for each screen, for Chromium

Android's own views are not here, so this shows order, sizes, colours and wrapping, not what a phone draws.
"""

from __future__ import annotations

import argparse
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

RES = Path(__file__).parent.parent / "res"
NS = "{http://schemas.android.com/apk/res/android}"
WIDTH, HEIGHT = 412, 892
Values = dict[str, str]
Get = Callable[[str], str | None]
# What code puts into views, by screen and id; "gone" hides one.
CHAT: Values = {
    "model_name": "gemma-3n-E2B-it",
    "model_line": "int4_g32 · 2,048 tokens · text, images, audio",
    "memory": "memory 1.62 GB, peak 1.71 GB of 1.84 GB",
    "memory_bar": "0.88",
}
ROWS = (
    ("turn_user", {"text": "Why is the sky blue?"}),
    (
        "turn_model",
        {
            "text": "Sunlight is a mix of colours. Air scatters the short, blue waves much more than the "
            "long, red ones, so blue light reaches your eyes from everywhere in the sky.",
            "note": "first token 1.4 s · 9.0 tok/s · 41 tokens",
        },
    ),
    ("turn_user", {"text": "And in the evening?"}),
    ("turn_model", {"text": "Then the light comes a longer way through the air", "note": "gone"}),
)
FITS, TIGHT = (
    "needs 441 MB, best 1.84 GB; 3.10 GB is free",
    "needs 459 MB, best 3.02 GB; 2.20 GB is free: weights",
)
CARDS = (
    (
        "model_card",
        {
            "name": "e2b.litertlm",
            "line": "gemma-3n-E2B-it · int4_g32 · 2,048 tokens · text · 2.84 GB",
            "fit": FITS,
        }
        | {"hash": "SHA-256 3fa92c01…b7710e5d"},
    ),
    (
        "model_card",
        {
            "name": "e4b.litertlm",
            "line": "gemma-3n-E4B-it · int4_g32 · 2,048 tokens · text · 4.19 GB",
            "hash": "gone",
        }
        | {"fit": f"{TIGHT} will be read again and again, slowly"},
    ),
    (
        "model_card",
        {"name": "half.litertlm", "line": "The model is incomplete: its end is missing. Copy it again."}
        | {"fit": "gone", "hash": "gone"},
    ),
)
SCREENS: dict[str, tuple[str, Values, tuple[tuple[str, Values], ...]]] = {
    "empty": (
        "chat",
        {"model_name": "Gemma Edge", "model_line": "Choose a model", "meter": "gone", "attach": "gone"},
        (),
    ),
    "chat": ("chat", CHAT | {"empty": "gone"}, ROWS),
    "loading": (
        "chat",
        CHAT
        | {
            "meter": "gone",
            "choose": "gone",
            "banner": "",
            "banner_bar": "0.4",
            "banner_button": "Stop",
            "attach": "gone",
        }
        | {"banner_text": "Packing weights, once · 560 MB of about 1.40 GB"},
        (),
    ),
    "models": ("models", {"title": "Models", "none": "gone"}, CARDS),
    "bench": (
        "bench",
        {"title": "Benchmark", "figures": "pp512 41.02 ± 0.31 tok/s\ntg128 @ d512 8.40 ± 0.05 tok/s"}
        | {"memory": "memory 1.62 GB, peak 1.71 GB of 1.84 GB"},
        (),
    ),
    "settings": (
        "settings",
        {
            "title": "Settings",
            "temperature": "1.0",
            "top_k": "64",
            "top_p": "0.95",
            "seed": "0",
            "max_tokens": "512",
        },
        (),
    ),
}


class Drawing:
    """One screen as HTML."""

    def __init__(self, dark: bool, scale: float) -> None:
        self.scale = scale
        self.colours = self._values("values/colors.xml", "color")
        if dark:
            self.colours |= self._values("values-night/colors.xml", "color")
        self.strings = self._values("values/strings.xml", "string")
        styles = ET.parse(RES / "values" / "styles.xml").getroot()
        self.styles = {
            style.get("name", ""): {f"{NS}{item.get('name', '')[8:]}": item.text or "" for item in style}
            for style in styles
        }

    def _values(self, name: str, tag: str) -> Values:
        return {each.get("name", ""): each.text or "" for each in ET.parse(RES / name).getroot().iter(tag)}

    def page(self, layout: str, texts: Values, rows: tuple[tuple[str, Values], ...]) -> str:
        body = self.view(self._layout(layout), "column", texts, rows)
        return (
            "<!doctype html><meta charset=utf-8><style>*{box-sizing:border-box;margin:0}"
            f"body{{width:{WIDTH}px;height:{HEIGHT}px;display:flex;overflow:hidden;"
            "font-family:Roboto,DejaVu Sans,sans-serif}"
            f"div,span,svg{{flex-shrink:0}}</style><body>{body}"
        )

    def _layout(self, name: str) -> ET.Element:
        return ET.parse(RES / "layout" / f"{name}.xml").getroot()

    def view(self, node: ET.Element, parent: str, texts: Values, rows: tuple[tuple[str, Values], ...]) -> str:
        if node.tag == "include":
            return self.view(self._layout(node.get("layout", "")[8:]), parent, texts, rows)
        style = self.styles.get(node.get("style", "").removeprefix("@style/"), {})
        values = {**style, **node.attrib}
        get: Get = values.get
        ident = (get(f"{NS}id") or "").rpartition("/")[2]
        told = texts.get(ident)
        hidden = get(f"{NS}visibility") == "gone" and told is None
        if told == "gone" or hidden:
            return ""
        css = dict(self.css(get, parent))
        inner = ""
        if node.tag in ("LinearLayout", "ScrollView", "HorizontalScrollView", "FrameLayout"):
            way = "row" if node.tag == "LinearLayout" and get(f"{NS}orientation") != "vertical" else "column"
            css |= {"display": "flex", "flex-direction": way, "overflow": "hidden"} | self.gravity(get, way)
            inner = "".join(self.view(child, way, texts, rows) for child in node)
        elif node.tag == "ListView":
            css |= {"overflow": "hidden"}
            inner = "".join(self.view(self._layout(name), "column", said, ()) for name, said in rows)
            if not rows:
                return ""
        elif node.tag in ("ImageButton", "ImageView"):
            css |= {"display": "flex", "align-items": "center", "justify-content": "center"}
            inner = self.vector(
                get(f"{NS}src") or "", self.colour(get(f"{NS}tint") or ""), node.tag == "ImageView"
            )
        elif node.tag == "ProgressBar":
            share = float(told or 0)
            css |= {
                "height": "4px",
                "border-radius": "2px",
                "background": self.colours["outline"],
                "margin": "4px 0",
            }
            inner = f"<div style='width:{share:.0%};height:4px;background:{self.colours['accent']}'></div>"
        else:
            text = told if told is not None else self.text(get(f"{NS}text") or get(f"{NS}hint") or "")
            css |= {"white-space": "pre-line", "overflow-wrap": "anywhere"} | self.letters(node.tag, get)
            inner = html.escape(text)
            if not text and node.tag != "EditText":
                return ""
        joined = ";".join(f"{key}:{value}" for key, value in css.items() if value)
        return f'<div style="{html.escape(joined)}">{inner}</div>'

    def css(self, get: Get, parent: str) -> Iterator[tuple[str, str]]:
        for name, css in (("layout_width", "width"), ("layout_height", "height")):
            value = get(f"{NS}{name}") or "wrap_content"
            along = (css == "width") == (parent == "row")
            if value == "match_parent":
                yield (("flex", "1 1 0") if along else ("align-self", "stretch"))
            elif value != "wrap_content" and value != "0dp":
                yield css, self.size(value)
            elif not along and value == "wrap_content" and parent == "column":
                yield "max-width", "100%"
        if get(f"{NS}layout_weight"):
            yield "flex", "1 1 0"
            yield "min-width", "0"
            yield "min-height", "0"
        for side, css in (("Start", "left"), ("End", "right"), ("Top", "top"), ("Bottom", "bottom")):
            for kind, name in (("padding", "padding"), ("margin", "layout_margin")):
                room = get(f"{NS}{name}{side}") or get(f"{NS}{name}")
                if room:
                    yield f"{kind}-{css}", self.size(room)
        yield "min-height", self.size(get(f"{NS}minHeight") or "")
        yield from self.background(get(f"{NS}background") or "")

    def gravity(self, get: Get, way: str) -> Values:
        said = get(f"{NS}gravity") or ""
        main, cross = ("justify-content", "align-items")
        across = {"center": "center", "end": "flex-end", "bottom": "flex-end"}
        css: Values = {}
        for word in said.split("|"):
            if word == "center":
                css |= {main: "center", cross: "center"}
            elif word == "center_vertical":
                css[cross if way == "row" else main] = "center"
            elif word in ("end", "bottom"):
                css[cross if (word == "end") == (way == "column") else main] = across[word]
        return css

    def letters(self, tag: str, get: Get) -> Values:
        size = float((get(f"{NS}textSize") or "14sp")[:-2]) * self.scale
        css = {
            "font-size": f"{size:g}px",
            "line-height": str(1.2 * float(get(f"{NS}lineSpacingMultiplier") or 1)),
        }
        css["color"] = self.colour(get(f"{NS}textColor") or "@color/text")
        if "medium" in (get(f"{NS}fontFamily") or ""):
            css["font-weight"] = "500"
        if tag == "Button":
            css |= {
                "display": "flex",
                "align-items": "center",
                "justify-content": "center",
                "font-weight": "500",
            }
        elif "center" in (get(f"{NS}gravity") or ""):
            css["text-align"] = "center"
        return css

    def background(self, value: str) -> Iterator[tuple[str, str]]:
        if value.startswith("@color/"):
            yield "background", self.colour(value)
        if value.startswith("@drawable/"):
            shape = ET.parse(RES / "drawable" / f"{value[10:]}.xml").getroot()
            for part in shape:
                if part.tag == "solid":
                    yield "background", self.colour(part.get(f"{NS}color", ""))
                if part.tag == "corners":
                    yield "border-radius", self.size(part.get(f"{NS}radius", ""))
                if part.tag == "stroke":
                    yield "border", f"1px solid {self.colour(part.get(f'{NS}color', ''))}"

    def vector(self, value: str, tint: str, fill: bool) -> str:
        image = ET.parse(RES / "drawable" / f"{value[10:]}.xml").getroot()
        side = image.get(f"{NS}viewportWidth")
        size = "100%" if fill else "24px"
        paths = "".join(
            f'<path fill="{tint or path.get(f"{NS}fillColor")}" d="{path.get(f"{NS}pathData")}"/>'
            for path in image
        )
        return f'<svg width="{size}" height="{size}" viewBox="0 0 {side} {side}">{paths}</svg>'

    def text(self, value: str) -> str:
        text = self.strings.get(value.removeprefix("@string/"), value)
        return re.sub(r"%1\$s", "Why is the sky blue?", text)

    def colour(self, value: str) -> str:
        return self.colours.get(value.removeprefix("@color/"), value if value.startswith("#") else "")

    @staticmethod
    def size(value: str) -> str:
        return f"{value[:-2]}px" if value.endswith("dp") else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--font-scale", type=float, default=1.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    drawing = Drawing(args.dark, args.font_scale)
    for name, (layout, texts, rows) in SCREENS.items():
        (args.folder / f"{name}.html").write_text(drawing.page(layout, texts, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
