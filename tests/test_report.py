"""The report: numbers into charts, records into one page, and the page in a browser."""

import html
import json
import os
import re
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.output import browser
from gemma_edge.benchmarks.output.browser import find_browser, screenshot
from gemma_edge.benchmarks.output.charts import (
    Bar,
    Layer,
    Mark,
    area_chart,
    bar_chart,
    histogram,
    line_chart,
    number,
    plus_minus,
    shorten,
    ticks,
)
from gemma_edge.benchmarks.output.report import render_page
from gemma_edge.benchmarks.records.environment import environment
from gemma_edge.benchmarks.records.results_file import parse_record
from gemma_edge.cli.main import main
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.typed_json import to_json
from gemma_edge.runtime.files.whole_file import write_whole
from support.small_disk import small_disk

GB = 10**9
ENVIRONMENT = to_json(environment())
TIME = "2026-11-21T10:00:00+00:00"
HOSTILE = '<script>alert("x")</script>&'


def bench_row(
    run: str = "r1", name: str = "E2B", test: str = "tg128", ts: float = 10.0, **more: Any
) -> dict[str, Any]:
    prompt = int(test[2:]) if test.startswith("pp") else 0
    return {
        "schema": 1, "kind": "bench", "run": run, "name": name, "device": "local", "time": TIME,
        "environment": ENVIRONMENT, "engine": "ONNX Runtime 1.31.1", "recipe": "int4", "test": test,
        "n_threads": 2, "n_prompt": prompt, "n_gen": 0 if prompt else 128, "n_depth": 0,
        "samples_ns": [round((prompt or 128) * 1e9 / speed) for speed in (ts * 0.95, ts * 1.05)],
        "bandwidth_share": 0.8, "bandwidth_gb_s": 15.0, **more,
    }  # fmt: skip


def session_row(run: str = "r1", name: str = "E2B", **more: Any) -> dict[str, Any]:
    seconds = [i * 0.5 for i in range(60)]
    sizes = {"rss_anon": GB, "rss_file": GB // 2, "rss": 3 * GB // 2, "pss": GB, "major_faults": 7}
    return {
        "schema": 1, "kind": "session", "run": run, "name": name, "device": "local",
        "time": TIME, "environment": ENVIRONMENT, "engine": "ONNX Runtime 1.31.1",
        "workload": {"threads": 2}, "load": {"cold_s": 4.0, "warm_s": 2.0, "import_s": 0.4},
        "notes": ["a note"],
        "phases": [
            {"name": "load", "start_s": 0, "end_s": 10},
            {"name": "pp512", "start_s": 10, "end_s": 29},
        ],
        "memory": {
            "steady": sizes,
            "peak": sizes,
            "timeline": {
                "seconds": seconds,
                "rss_anon": [int(GB * min(1, s / 10)) for s in seconds],
                "rss_file": [GB // 2] * 60,
            },
        },
        "latency": {
            "prompt_tokens": 128, "answer_tokens": 5, "requests": 2, "samples_ttft_ms": [900.0, 950.0],
            "ttft_ms": {"p50": 900.0, "p90": 950.0, "p99": 950.0},
            "itl_ms": {"p50": 100.0, "p90": 120.0, "p99": 180.0},
            "samples_itl_ms": [90.0 + (i * 37) % 40 for i in range(99)] + [180.0],
        },
        "ceiling": {"limit_bytes": 2 * 2**30, "met": True, "enforced": True, "text": "runs under 2 GiB"},
        "sustained": {
            "text": "decode kept", "decode_first_tps": 10.0, "decode_last_tps": 9.0, "decode_kept": 0.9,
            "points": [{"t_s": i * 30.0, "tg_ts": 10 - i / 9, "temperature_c": 50 + i} for i in range(9)],
        },
        "bars": [{"what": "decode, tok/s", "value": 10.0, "bar": 8.0, "met": True}],
        "ratios": [
            {"engine": "llama.cpp", "test": "tg128", "ratio": 1.3, "samples": [1.2, 1.3, 1.4], "rounds": 3}
        ],
        **more,
    }  # fmt: skip


def full() -> list[dict[str, Any]]:
    return [
        bench_row(test="pp512", ts=92.0),
        bench_row(),
        session_row(),
        bench_row("r2", test="pp512", ts=120.0, engine="LiteRT 2.3.0"),
        bench_row("r2", ts=12.0, engine="LiteRT 2.3.0"),
        session_row("r2", engine="LiteRT 2.3.0"),
        {
            "schema": 1, "kind": "load", "name": "E2B", "time": "2026-11-20T00:00:00+00:00",
            "environment": ENVIRONMENT,
            "readme": [{"row": "under 2 GiB", "bar": "completes", "value": "completes"}],
        },
    ]  # fmt: skip


def page_of(rows: list[dict[str, Any]]) -> str:
    return render_page([parse_record(row) for row in rows])


class Page(HTMLParser):
    """Tags that are open in the wrong order, addresses, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# Charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "expected"),
    [(10, [0, 2, 4, 6, 8, 10]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (7, [0, 2, 4, 6, 8]), (0, [0, 1])],
)
def test_ticks_are_round_and_reach_the_top(top: float, expected: list[float]) -> None:
    assert ticks(top) == pytest.approx(expected)


@pytest.mark.parametrize("top", [1e-9, 0.3, 99.99, 1234, 7.7e12])
def test_ticks_are_few(top: float) -> None:
    found = ticks(top)
    assert 3 <= len(found) <= 7 and found[-1] >= top * (1 - 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.4, "1234"), (85.123, "85.1"), (0.4213, "0.421"), (10.0, "10"), (100, "100")],
)
def test_numbers_have_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def shapes(svg: str, tag: str) -> list[Any]:
    """All elements of a kind; the chart is well-formed."""
    return list(ElementTree.fromstring(svg).iter(tag))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("a", 100, 5, (95, 105)), Bar("b", 50, series=1)], "tok/s")
    first, second = shapes(svg, "rect")
    assert float(first.get("width")) == pytest.approx(2 * float(second.get("width")), rel=0.01)
    assert len(shapes(svg, "circle")) == 2
    assert "a: 100 ± 5 tok/s; samples: 95, 105" in [title.text for title in shapes(svg, "title")]


def test_areas_are_stacked_below_the_mark() -> None:
    svg = area_chart(
        [0, 1, 2],
        [Layer("anon", [1, 2, 3]), Layer("file", [1, 1, 1], 1)],
        y_format=number,
        x_unit="s",
        marks=[Mark("ceiling", 8)],
        bands=[("load", 0, 1)],
    )
    (mark,) = [path for path in shapes(svg, "path") if path.get("class") == "mark"]
    limit = float(re.findall(r"[\d.]+", mark.get("d"))[1])
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", shapes(svg, "path")[-2].get("d"))]
    assert limit < min(heights), "the ceiling lies above what was used"


def test_histogram_counts_every_value_once() -> None:
    values = [1.0] * 5 + [2.0] * 3 + [9.0]
    svg = histogram(values, [Mark("P50", 1.0)], x_unit="ms")
    counts = [int((rect[0].text or "").rpartition(": ")[2]) for rect in shapes(svg, "rect")]
    assert sum(counts) == 9 and max(counts) == 5


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [3.0, 3.0, 3.0]])
def test_charts_of_values_that_are_all_the_same(values: list[float]) -> None:
    for svg in (
        histogram(values, [], x_unit="ms"),
        line_chart(list(range(len(values))), [Layer("a", values)], y_format=number, x_unit="s"),
        bar_chart([Bar("a", value) for value in values], "tok/s"),
    ):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


def test_long_labels_keep_both_ends() -> None:
    assert shorten("short") == "short"
    text = shorten("pp512 · " + "x" * 80 + " · 2 threads")
    assert len(text) <= 44 and text.startswith("pp512") and text.endswith("2 threads")


# The page ---------------------------------------------------------------------------------------------


def test_page_holds_every_section_and_needs_no_network() -> None:
    text = page_of(full())
    page = Page(text)
    headings = (
        "Speed",
        "Memory over time",
        "Latency",
        "Sustained",
        "Runs compared",
        "Peers",
        "Measured against a target",
    )
    for heading in (*headings, "Sessions", "Machines"):
        assert heading in page.texts
    assert page.addresses == [] and "http" not in text and "@import" not in text and "url(" not in text
    assert page.tags.count("svg") == 2 * (2 + 2 + 2 + 4), "each for wide and for narrow screens"
    assert "script" not in page.tags
    assert "120 (1.30x)" in page.texts, "the second run against the first"


def test_runs_of_one_bundle_have_titles_of_their_own() -> None:
    rows = [session_row(run) for run in ("r1", "r2")] + [bench_row(run) for run in ("r1", "r2")]
    text = page_of(rows)
    headings = re.findall(r"<h3>(.*?)</h3>", text)
    assert len(headings) == 4 and len(set(headings)) == 4
    assert headings[:2] == ["E2B · run 1", "E2B · run 2"]
    # A label is short enough to be whole: it has what differs, and no more.
    assert "tg128 · E2B · run 1</text>" in text and "…" not in text
    assert "local · 2 threads · ONNX Runtime 1.31.1 · 2026-11-21 10:00" in text
    two = page_of([session_row(), session_row(device="pi", engine="LiteRT 2.3.0")])
    assert "<h3>E2B · pi · LiteRT 2.3.0</h3>" in two


@pytest.mark.parametrize(
    ("value", "sd", "text"),
    [
        (0.0057, 0.00012, "0.00570 ± 0.00012"),
        (0.24, 0.00787, "0.2400 ± 0.0079"),
        (42.7, 6.74, "42.7 ± 6.7"),
        (539.4, 194, "539 ± 194"),
        (12.0, 0, "12"),
    ],
)
def test_a_mean_has_the_digits_that_its_deviation_needs(value: float, sd: float, text: str) -> None:
    assert plus_minus(value, sd) == text


def test_every_chart_of_the_page_is_well_formed() -> None:
    charts = re.findall(r"<svg.*?</svg>", page_of(full()), re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
        assert not re.search(r"\b(nan|inf)\b", chart)


def test_names_from_files_are_text_and_not_markup() -> None:
    rows = [
        bench_row(name=HOSTILE, engine=HOSTILE),
        session_row(name=HOSTILE, notes=[HOSTILE], error=HOSTILE),
    ]
    page = Page(page_of(rows))
    assert "script" not in page.tags
    assert any(HOSTILE in text for text in page.texts)


@pytest.mark.parametrize(
    "rows",
    [
        [bench_row()],
        [
            session_row(
                memory=None, latency=None, sustained=None, ceiling=None, phases=None, bars=None, ratios=None
            )
        ],
        [
            {
                "schema": 1,
                "kind": "session",
                "name": "x",
                "time": "2026",
                "run": "r",
                "device": "d",
                "error": "gone",
            }
        ],
        [{"schema": 1, "kind": "load", "name": "x", "time": "2026", "readme": []}],
    ],
)
def test_records_with_little_in_them_make_a_page(rows: list[dict[str, Any]]) -> None:
    Page(page_of(rows))


def test_verb_writes_page_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in full()))
    out, md = tmp_path / "a" / "report.html", tmp_path / "report.md"
    assert main(["report", str(results), "-o", str(out), "--md", str(md)]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(md)]
    assert out.read_text().startswith("<!doctype html>")
    assert "| pp512 | 92.00 ± 6.51 | 92.00 |" in md.read_text()


@pytest.mark.parametrize("flag", ["-o", "--md", "--png"])
def test_a_full_disk_leaves_no_half_page(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if flag == "--png" and find_browser() is None:
        pytest.skip("no Chromium or Chrome")
    results, page = tmp_path / "r.jsonl", tmp_path / "page.html"
    results.write_text("".join(json.dumps(row) + "\n" for row in full()))
    with small_disk(tmp_path / "disk", 4) as disk:
        old, ballast = disk / "old.png", disk / "ballast"
        old.write_text("the old one")
        ballast.write_bytes(bytes((4 << 20) - 4096))
        output = ["-o", str(old)] if flag == "-o" else ["-o", str(page), flag, str(old)]
        assert main(["report", str(results), *output]) != 0
        assert old.read_text() == "the old one"
        assert sorted(disk.iterdir()) == [ballast, old]
        ballast.unlink()
        assert main(["report", str(results), *output]) == 0
        assert old.read_bytes()[:11] != b"the old one" and list(disk.iterdir()) == [old]
    assert "internal error" not in capsys.readouterr().err


def test_a_page_replaces_the_file_that_a_link_names_and_keeps_its_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file.name)
    write_whole(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


def test_a_page_goes_to_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), "page")
    os.close(writer)
    with open(reader) as pipe:
        assert pipe.read() == "page"


def test_file_without_results_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert main(["report", str(tmp_path / "empty.jsonl")]) == 2
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert main(["report", str(tmp_path / "bad.jsonl")]) == 3
    assert "bad.jsonl: line 1" in capsys.readouterr().err


def test_picture_without_a_browser_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "BROWSERS", ())
    monkeypatch.delenv(browser.BROWSER_VARIABLE, raising=False)
    with pytest.raises(DeviceError, match="needs Chromium or Chrome"):
        screenshot(tmp_path / "page.html", tmp_path / "page.png")


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome")
def test_browser_renders_the_page_light_and_dark(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of(full()))
    sizes = []
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        screenshot(page, picture, dark=dark)
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[0] == sizes[1] and sizes[0][0] == 1000
    assert sizes[0][1] > 2000, "as high as the page, not as a window"
    light, dark_bytes = ((tmp_path / f"{dark}.png").read_bytes() for dark in (False, True))
    assert light != dark_bytes and min(len(light), len(dark_bytes)) > 50_000


# In a frame of some width: texts of less than 11 pixels, pairs that touch, whether the page is too wide.
MEASURE = """
const shown = [...document.querySelectorAll("svg text")].filter(t => t.getClientRects().length);
const small = shown.filter(t => {
  const svg = t.closest("svg"), box = svg.viewBox.baseVal;
  return parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / box.width < 11;
}).length;
const touching = [];
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()])
    .filter(([_, b]) => b.width);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 3) touching.push([one, other]);
  }));
}
const over = document.documentElement.scrollWidth > innerWidth;
parent.postMessage({small, touching, over, texts: shown.length}, "*");
"""
FRAME = """<title>waiting</title><script>
addEventListener("message", e => document.title = "measured " + JSON.stringify(e.data));
</script><iframe src="page.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome")
@pytest.mark.parametrize("width", [390, 700, 1440])
def test_in_a_browser_labels_can_be_read_and_do_not_touch(width: int, tmp_path: Path) -> None:
    page = page_of([*full(), session_row("r3"), bench_row("r3")])
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{MEASURE}</script></body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    argv = [str(find_browser()), "--headless", "--disable-gpu", "--no-sandbox", "--virtual-time-budget=5000"]
    argv += [f"--user-data-dir={tmp_path}/profile", "--window-size=1600,1000", "--dump-dom"]
    argv.append((tmp_path / "frame.html").as_uri())
    asked = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    found = re.search(r"<title>measured (.*?)</title>", asked.stdout)
    assert found, asked.stderr
    measured = json.loads(html.unescape(found[1]))
    assert measured.pop("texts") > 40
    assert measured == {"small": 0, "touching": [], "over": False}
