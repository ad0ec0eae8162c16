"""README and documents say what the code says."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.cli.main import INTERRUPTED
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import list_recipes, load_recipe
from gemma_edge.runtime import errors
from gemma_edge.runtime.host.offline import SILENCED
from support.repository import DOCUMENTS, PACKAGES, ROOT, blocks, read

README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
RECIPES, EXIT_CODES = (read(ROOT / "docs" / f"{name}.md") for name in ("recipes", "exit-codes"))


def test_the_page_of_recipes_has_every_cache_and_bound() -> None:
    rows = {line.split("|")[1]: line for line in RECIPES.splitlines() if line.startswith("| `")}
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} == set(list_recipes())
    for cell, line in rows.items():
        for name in re.findall(r"`(\w+)`", cell):
            recipe = load_recipe(name)
            bounds = f"{recipe.bounds.mean_kl:g}, {recipe.bounds.top1:g}"
            assert line.rstrip().endswith(f"| {recipe.kv_cache} | {bounds} |"), name


def test_the_page_of_exit_codes_has_every_one() -> None:
    table = [line for line in (errors.__doc__ or "").splitlines() if re.match(r"\| \d", line)]
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.GemmaEdgeError)
    ]
    documented = {int(line.split("|")[1]) for line in table}
    assert documented == {0, INTERRUPTED, *(c.exit_code for c in classes)}
    assert [line for line in table if line not in EXIT_CODES] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = read(document)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = re.findall(
        r"`((?:export|runtime|devices|benchmarks|cli|tests|docs)/[\w/]+\.(?:py|md|json))`", text
    )
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


# How a reader runs what is printed: a file, a pipe, a notebook. A notebook's __main__ has no file, no child
# inherits its output, and its code runs inside an event loop.
NOTEBOOK = """
import asyncio, contextlib, io, sys
async def cell():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "<cell>", "exec"), vars(sys.modules["__main__"]))
    print(out.getvalue())
source = open("printed.py").read()
asyncio.run(cell())
"""
WAYS = {
    "script": (["printed.py"], None),
    "stdin": (["-"], "printed.py"),
    "notebook": (["-c", NOTEBOOK], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("document", "printed"), [(README, ""), (GUIDE, "Agreement(")], ids=["README", "guide"]
)
def test_printed_python_runs(document: Path, printed: str, way: str, tmp_path: Path) -> None:
    (code,) = blocks(document, "python")
    (tmp_path / "printed.py").write_text(code)
    synthesize(tmp_path / "ckpt", "tiny", progress=False)
    arguments, piped = WAYS[way]
    with open(tmp_path / piped if piped else os.devnull) as stdin:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, stdin=stdin, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout and done.stdout.strip()


def test_generated_documents_are_current() -> None:
    """docs/cli.md is that of the parsers, the file tree of ARCHITECTURE.md that of the docstrings."""
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["documents"]()
    stale = [path.name for path, text in generated.items() if read(path) != text]
    assert stale == [], "run python docs/generate.py"


def test_the_readme_is_short() -> None:
    assert len(read(README).splitlines()) < 250


def test_the_page_of_variables_has_every_one() -> None:
    sources = [p for top in (*PACKAGES, "tests", ".ci") for p in (ROOT / top).rglob("*") if p.is_file()]
    texts = [read(path) for path in sources if path.suffix in (".py", ".sh", "")]
    used = {name for text in texts for name in re.findall(r"\bGEMMA_EDGE_[A-Z_]+[A-Z]\b", text)}
    page = re.findall(r"^\| `([A-Z_]+)` \|", read(ROOT / "docs" / "environment.md"), re.MULTILINE)
    ours = [name for name in page if name.startswith("GEMMA_EDGE_")]
    assert sorted(ours) == sorted(used) and len(set(page)) == len(page)
    assert set(SILENCED) <= set(page)
