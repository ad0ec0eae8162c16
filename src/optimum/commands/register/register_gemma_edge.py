"""`optimum-cli export gemma-edge ...`: the arguments and the function of `gemma-edge export`.

optimum imports every module of this namespace each time it starts, so that this one must be light, and must
not fail where the exporter's packages are missing. (No `__init__.py` may lie in this folder or above it.)
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

NAME = "gemma-edge"


class GemmaEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Exports a Gemma 3n checkpoint for phones and single-board computers."""

    COMMAND = CommandInfo(name=NAME, help="Export Gemma 3n to ONNX Runtime or LiteRT with gemma-edge.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        if NAME in sys.argv:
            from gemma_edge.cli.export import configure

            configure(parser)

    def run(self) -> None:
        from gemma_edge.cli.export import run
        from gemma_edge.runtime.errors import GemmaEdgeError

        try:
            code = run(self.args)
        except GemmaEdgeError as error:
            print(f"{NAME}: error: {error}", file=sys.stderr)
            code = error.exit_code
        sys.exit(code)


REGISTER_COMMANDS = [(GemmaEdgeExportCommand, ExportCommand)]
