"""Print what makes a shell complete verbs, options, recipes and files at the Tab key.

    eval "$(gemma-edge completion bash)"                    in ~/.bashrc
    eval "$(gemma-edge completion zsh)"                     in ~/.zshrc, after compinit
    gemma-edge completion fish > ~/.config/fish/completions/gemma-edge.fish

Completion needs argcomplete, which the extra `completion` installs.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from typing import Any

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_ARGCOMPLETE"  # set by the shell when it asks for completions


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge completion`."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to print for")


def run(args: argparse.Namespace) -> int:
    """Prints the shell's code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["gemma-edge"], shell=args.shell))
    return 0


def complete(verbs: Mapping[str, tuple[str, str]]) -> None:
    """Answers a shell that asks for completions, and ends the process.

    Args:
        verbs: module and help of each; only the verb that is typed is imported.
    """
    import argcomplete

    typed = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser(prog="gemma-edge")
    parsers = parser.add_subparsers()
    for verb, (module, text) in verbs.items():
        made = parsers.add_parser(verb, help=text)
        if verb in typed[1:]:
            importlib.import_module(module).configure(made)
            for action in made._actions:
                _complete_values(action)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _complete_values(action: Any) -> None:
    if action.dest == "recipe":
        from gemma_edge.export.weights.recipe import list_recipes

        action.completer = lambda **_: list(list_recipes())
