"""README and documents say what the code says."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from gemma_edge.cli.main import INTERRUPTED, VERBS
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.weights.recipe import list_recipes, load_recipe
from gemma_edge.runtime import errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE, RECIPES, EXIT_CODES = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("guide", "recipes", "exit-codes")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pocket" / "README.md"])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The arguments of every `gemma-edge VERB ...` in the code of README and documents."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    lines = [
        line
        for text in texts
        for block in [*blocks(text, "sh"), *blocks(text, "console")]
        for line in block.splitlines()
    ]
    for line in dict.fromkeys(lines):
        for part in re.split(r"&&|\||<", line.removeprefix("$ ")):
            if part.strip().startswith("gemma-edge "):
                yield shlex.split(part, comments=True)[1:]


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_every_printed_command_parses(argv: list[str]) -> None:
    module = importlib.import_module(VERBS[argv[0]][0])
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    module.configure(parser)
    parser.parse_intermixed_args(argv[1:])


def test_the_documents_show_every_verb() -> None:
    assert {argv[0] for argv in commands()} == set(VERBS)


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


def test_the_distribution_has_every_source_file() -> None:
    found = set(find_namespace_packages(str(ROOT / "src")))
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        top, *rest = Path(name).parent.parts or ("",)
        if top in ("export", "runtime", "benchmarks", "cli"):
            assert ".".join(["gemma_edge", top, *rest]) in found, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = re.findall(r"`((?:export|runtime|benchmarks|cli|tests|docs)/[\w/]+\.(?:py|md|json))`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("text", "printed"), [(README, ""), (GUIDE, "Agreement(")], ids=["README", "guide"])
def test_printed_python_runs(
    text: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = blocks(text, "python")
    monkeypatch.chdir(tmp_path)
    synthesize("ckpt", "tiny", progress=False)
    exec(compile(code, "printed.py", "exec"), {})
    assert printed in capsys.readouterr().out


def test_generated_documents_are_current() -> None:
    """docs/cli.md is that of the parsers, the file tree of ARCHITECTURE.md that of the docstrings."""
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))["documents"]()
    stale = [path.name for path, text in generated.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python docs/generate.py"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250
