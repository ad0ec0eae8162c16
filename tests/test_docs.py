"""README and documents say what the code says."""

from __future__ import annotations

import argparse
import importlib
import re
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
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The arguments of every `gemma-edge VERB ...` in the README's code."""
    for block in [*blocks(README, "sh"), *blocks(README, "console")]:
        for line in block.splitlines():
            for part in re.split(r"&&|\||<", line.removeprefix("$ ")):
                if part.strip().startswith("gemma-edge "):
                    yield shlex.split(part, comments=True)[1:]


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_every_command_of_the_readme_parses(argv: list[str]) -> None:
    module = importlib.import_module(VERBS[argv[0]][0])
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    module.configure(parser)
    parser.parse_intermixed_args(argv[1:])


def test_the_readme_shows_every_verb() -> None:
    assert {argv[0] for argv in commands()} == set(VERBS)


def test_the_readme_names_every_recipe_with_its_cache_and_bounds() -> None:
    table = README.partition("## Recipes")[2].partition("\n## ")[0]
    rows = {line.split("|")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} == set(list_recipes())
    for cell, line in rows.items():
        for name in re.findall(r"`(\w+)`", cell):
            recipe = load_recipe(name)
            bounds = f"{recipe.bounds.mean_kl:g}, {recipe.bounds.top1:g}"
            assert line.rstrip().endswith(f"| {recipe.kv_cache} | {bounds} |"), name


def test_the_readme_has_every_exit_code() -> None:
    table = [line for line in (errors.__doc__ or "").splitlines() if re.match(r"\| \d", line)]
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.GemmaEdgeError)
    ]
    documented = {int(line.split("|")[1]) for line in table}
    assert documented == {0, INTERRUPTED, *(c.exit_code for c in classes)}
    assert [line for line in table if line not in README] == []


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


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    synthesize("ckpt", "tiny", progress=False)
    exec(compile(code, "README.md", "exec"), {})
    assert "Agreement(" in capsys.readouterr().out
