"""The rules of the house that a machine can check: which way data flows, and one name for one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from support.repository import PACKAGES, ROOT, read

# What a package may import beside itself.
MAY_IMPORT = {
    "runtime": (),
    "export": ("runtime",),
    "devices": ("runtime",),
    "benchmarks": ("runtime", "export", "devices"),
    "cli": ("runtime", "export", "devices", "benchmarks"),
}
MOST_LINES = 600
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
Graph = Mapping[str, set[str]]


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever the import stands: "runtime.artifacts.bundle"."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_edge."):
            module = str(node.module).removeprefix("gemma_edge.")
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in SOURCES else module
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("gemma_edge.") for a in node.names if a.name.startswith("gemma_edge.")
            )


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected sets of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            ring = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(ring) > 1:
                found.append(sorted(ring))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


# A package's __init__ offers names of its modules lazily: it stands outside the flow.
EDGES = {
    name: set(imported(path))
    for name, path in SOURCES.items()
    if name not in [f"{p}.__init__" for p in PACKAGES]
}


def folder_of(module: str) -> str:
    """A module's room: its folder, or the module itself if it lies at the top of its package."""
    parts = module.split(".")
    return ".".join(parts[:-1]) if len(parts) > 2 else module


def test_no_file_imports_in_a_circle() -> None:
    assert circles(EDGES) == []


def test_no_folder_imports_in_a_circle() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, others in EDGES.items():
        rooms[folder_of(name)] |= {folder_of(other) for other in others} - {folder_of(name)}
    assert circles(rooms) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        f"{name} imports {other}"
        for name, others in EDGES.items()
        for other in others
        if name.split(".")[0] == package and other.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_no_two_rooms_share_a_name() -> None:
    """A module's name tells what it holds without its folder's. Verbs are named as they are typed."""
    rooms = defaultdict(list)
    for name in SOURCES:
        if not name.endswith("__init__") and not name.startswith("cli."):
            rooms[name.split(".")[-1]].append(name)
    assert {name: places for name, places in rooms.items() if len(places) > 1} == {}


def test_no_file_is_two_rooms_in_one() -> None:
    long = {n: len(read(p).splitlines()) for n, p in SOURCES.items()}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


def test_formats_are_objects_not_names_to_compare() -> None:
    pattern = re.compile(r"\bformat\b\s*(==|!=|\bin\b|\bnot in\b)\s*[\"'(]")
    found = [
        f"{name}:{number}"
        for name, path in SOURCES.items()
        for number, line in enumerate(read(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_argparse_lives_in_cli_and_benchmarks() -> None:
    found = [
        name
        for name, path in SOURCES.items()
        if name.split(".")[0] in ("runtime", "export")
        and re.search(r"^\s*(import|from) argparse", read(path), re.MULTILINE)
    ]
    assert found == []


def test_modules_named_in_text_exist() -> None:
    """Dotted names in strings and documents, which no import and no type checker sees."""
    texts = [path for top in (*PACKAGES, "tests", "pocket", "docs") for path in (ROOT / top).rglob("*.*")]
    texts = [path for path in texts if path.suffix in (".py", ".md", ".sh")]
    named = re.compile(r"\bgemma_edge\.((?:runtime|export|devices|benchmarks|cli)(?:\.[a-z_0-9]+)*)")
    missing = set()
    for path in [*texts, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]:
        for name in named.findall(read(path)):
            place = ROOT
            for part in name.split("."):
                if place.is_dir() and not (place := place / part).is_dir():
                    place = place.with_suffix(".py")
                    if not place.is_file() and part not in read(place.parent / "__init__.py"):
                        missing.add(f"{path.relative_to(ROOT)}: gemma_edge.{name}")
                    break
    assert missing == set()
