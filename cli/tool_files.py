"""Arguments for tools and for the form of an answer: `--tools`, `--json-schema`, `--choices` and more."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from gemma_edge.runtime.conversations.tool_loop import callable_tools
from gemma_edge.runtime.errors import FileError, UsageError, printable
from gemma_edge.runtime.files.text_files import read_text
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS
from gemma_edge.runtime.prompt.tool_schemas import Tool, normal_tools

MODULE = "gemma_edge_tools"  # the name that a file of tools is imported as


def add_tools(parser: argparse.ArgumentParser, text: str) -> None:
    """The tools that the model may call, and how."""
    parser.add_argument("--tools", metavar="FILE", help=text)
    parser.add_argument(
        "--tool-choice",
        metavar="CHOICE",
        help="auto holds calls to the tools' schemas, required makes the answer a call, none a text; "
        "or a tool's name (default: calls are found, but not held to anything)",
    )
    parser.add_argument(
        "--tool-convention",
        choices=CONVENTIONS,
        help="how calls are written (default: as the template has it)",
    )


def add_forms(parser: argparse.ArgumentParser) -> None:
    """The form that an answer must have."""
    parser.add_argument("--json-schema", metavar="FILE", help="answer with JSON that fits this schema")
    parser.add_argument("--choices", metavar="A,B,C", help="answer with one of these texts")
    parser.add_argument(
        "--regex", metavar="EXPRESSION", help="answer with a text that matches this expression"
    )
    parser.add_argument(
        "--grammar", metavar="FILE", help="answer as this grammar in llguidance's Lark has it"
    )


def tool_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Model.generate` from those of `add_tools`.

    Raises:
        UsageError, FileError: as `tools_from`, or an option needs --tools.
    """
    if args.tools is None and (args.tool_choice or args.tool_convention):
        raise UsageError("--tool-choice and --tool-convention need --tools")
    tools = None if args.tools is None else tools_from(Path(args.tools))
    return {"tools": tools, "tool_choice": args.tool_choice, "tool_convention": args.tool_convention}


def form_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Model.generate` from those of `add_forms`.

    Raises:
        FileError: a file cannot be read, or holds no JSON.
    """
    response_format = None
    if args.json_schema is not None:
        schema = _json(Path(args.json_schema))
        response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    return {
        "response_format": response_format,
        "choices": None if args.choices is None else [text.strip() for text in args.choices.split(",")],
        "regex": args.regex,
        "grammar": None if args.grammar is None else read_text(Path(args.grammar), FileError),
    }


def tools_from(path: Path) -> list[Tool]:
    """The tools of a file: a .json list of schemas, or the functions of a .py file, which is run.

    Raises:
        UsageError: the file has another suffix, cannot be run, or its tools cannot be used.
        FileError: it cannot be read, or holds no JSON.
    """
    if path.suffix == ".py":
        tools = normal_tools(_functions(path))
    elif path.suffix == ".json":
        loaded = _json(path)
        tools = normal_tools(loaded.get("tools", [loaded]) if isinstance(loaded, dict) else loaded)
    else:
        raise UsageError(f"--tools {path}: expected a .json file of schemas or a .py file of functions")
    if not tools:
        raise UsageError(f"--tools {path}: it has no tools")
    return tools


def _functions(path: Path) -> list[Any]:
    read_text(path, FileError)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--tools {path}: it is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise UsageError(f"--tools {path}: {type(error).__name__}: {printable(error)}") from None
    return callable_tools(vars(module), MODULE)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, FileError))
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, json.JSONDecodeError) else "nested too deep, or a huge number"
        raise FileError(path, "file", "JSON", reason) from None
