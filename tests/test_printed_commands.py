"""What documents print: commands that their programs take, Python that imports, JSON and TOML that parse."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from gemma_edge.cli.main import VERBS
from support.repository import DOCUMENTS, PACKAGES, ROOT, blocks, prose, read

PROJECT = tomllib.loads(read(ROOT / "pyproject.toml"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SYSTEM = {"cd", "cp", "export", "git", "sed"}  # programs of which nothing is ours to check
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def lines() -> Iterator[str]:
    """Command lines: those of shell blocks, behind a console's prompt, and the examples of a verb's help."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            yield from block.splitlines()
        for block in blocks(document, "console"):
            yield from (line[2:] for line in block.splitlines() if line.startswith("$ "))
        for block in blocks(document, ""):
            # Two spaces part an example from its explanation; a usage is no command.
            examples = (re.split(" {2,}", line)[0] for line in block.splitlines())
            yield from (e for e in examples if e.startswith("gemma-edge ") and "[" not in e)


def commands() -> Iterator[tuple[str, ...]]:
    """The words of each command, without what is redirected from and to where."""
    for line in dict.fromkeys(lines()):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for parts, words in groupby(lexer, lambda word: word in ("&&", "|", ";")):
            if not parts:
                told = list(words)
                while redirected := {"<", ">"} & set(told):
                    at = told.index(redirected.pop())
                    del told[at : at + 2]
                yield tuple(told)


def options(words: Sequence[str]) -> set[str]:
    return {name for word in words if OPTION.fullmatch(name := word.partition("=")[0])}


@cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    importlib.import_module(VERBS[verb][0]).configure(parser)
    return parser


def gemma_edge(arguments: Sequence[str]) -> None:
    if arguments[0] in ("version", "help"):
        assert set(arguments[1:]) <= set(VERBS)
        return
    assert arguments[0] in VERBS
    parser_of(arguments[0]).parse_intermixed_args(arguments[1:])


@cache
def help_of(module: str) -> str:
    argv = [sys.executable, "-m", module, "--help"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600, check=True).stdout


def python(arguments: Sequence[str]) -> None:
    """A module tells its options; a script, which may need packages of its own, is read instead."""
    if arguments[0] == "-m":
        module, *arguments = arguments[1:]
        known = help_of(module)
    else:
        known = read(ROOT / arguments[0])
    assert options(arguments) <= set(OPTION.findall(known))
    files = [word for word in arguments if re.match(rf"({'|'.join(PACKAGES)}|pocket|docs|tests)/", word)]
    assert [name for name in files if not list(ROOT.glob(name))] == []


def pip(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    rest = iter(arguments[1:])
    for word in rest:
        if word in ("-c", "-r"):
            assert (ROOT / next(rest)).is_file()
        elif found := re.fullmatch(r"(?:\.|gemma-edge)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(EXTRAS)
        elif not word.startswith("-") and word != ".":
            assert re.search(rf"^{word}==", read(ROOT / "constraints.txt"), re.MULTILINE)


def run_pytest(arguments: Sequence[str]) -> None:
    markers = [text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"].get("markers", [])]
    rest = iter(arguments)
    for word in rest:
        if word == "-m":
            assert set(re.findall(r"\w+", next(rest))) <= {*markers, "not", "and", "or"}
        elif not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists()


def installed_for_developers(name: str) -> Callable[[Sequence[str]], None]:
    def check(_: Sequence[str]) -> None:
        assert any(requirement.startswith(name) for requirement in EXTRAS["dev"])

    return check


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "gemma-edge": gemma_edge,
    "python": python,
    "pip": pip,
    "pytest": run_pytest,
    **{name: installed_for_developers(name) for name in ("mypy", "pre-commit", "ruff")},
}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_program_takes_the_command(words: tuple[str, ...]) -> None:
    program, *arguments = words
    if program in PROGRAMS:
        PROGRAMS[program](arguments)
    elif program not in SYSTEM:
        assert (ROOT / program).stat().st_mode & 0o111, "neither a known program nor an executable of ours"


def test_the_documents_show_every_verb() -> None:
    assert {words[1] for words in commands() if words[0] == "gemma-edge"} - {"version", "help"} == set(VERBS)


@cache
def every_option() -> set[str]:
    """The options of all verbs, and all that our sources name."""
    verbs = {option for verb in VERBS for option in parser_of(verb)._option_string_actions}
    folders = (*PACKAGES, "pocket", "docs")
    return verbs.union(*(OPTION.findall(read(p)) for top in folders for p in (ROOT / top).rglob("*.py")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_verbs_and_options_in_prose_exist(document: Path) -> None:
    code = [text.split() for text in re.findall(r"(?<!`)`(\S[^`\n]*)`(?!`)", prose(document))]
    ours = [words for words in code if words[0] in ("gemma-edge", "optimum-cli") or words[0].startswith("--")]
    verbs = {words[1] for words in ours if words[0] == "gemma-edge" and len(words) > 1}
    assert verbs <= {*VERBS, "VERB", "--help", "--version", "version", "help"}
    assert options([word for words in ours for word in words]) - {"--help", "--version"} <= every_option()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_printed_python_compiles_and_imports_names_that_exist(document: Path) -> None:
    for node in (node for code in blocks(document, "python") for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(("language", "parse"), [("json", json.loads), ("toml", tomllib.loads)])
def test_printed_data_is_well_formed(language: str, parse: Callable[[str], object]) -> None:
    assert [parse(code) for document in DOCUMENTS for code in blocks(document, language)]
