"""`optimum-cli export gemma-edge -m ID --task TASK OUT`: `gemma-edge export`, named as optimum names things.

optimum imports every module of this namespace each time it starts, so that this one must be light, and must
not fail where the exporter's packages are missing. (No `__init__.py` may lie in this folder or above it.)
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

NAME = "gemma-edge"
# A task of optimum's, and the inputs of a bundle for it; None for all that the checkpoint has.
TASKS = {
    "auto": None,
    "any-to-any": None,
    "text-generation": "text",
    "text-generation-with-past": "text",
    "image-text-to-text": "text,image",
    "automatic-speech-recognition": "text,audio",
}


class GemmaEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Exports a Gemma 3n checkpoint for phones and single-board computers."""

    COMMAND = CommandInfo(name=NAME, help="Export Gemma 3n to ONNX Runtime or LiteRT with gemma-edge.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        if NAME in sys.argv:
            from gemma_edge.cli.export import OUT_HELP, add_export_options

            # `-m ID OUT` as with optimum's own exporters, or `ID OUT` as with `gemma-edge export`.
            parser.add_argument("-m", "--model", metavar="ID", help="the checkpoint: a folder or a hub's id")
            parser.add_argument("paths", nargs="*", metavar="OUT", help=OUT_HELP)
            parser.add_argument(
                "--task", choices=TASKS, default="auto", help="which inputs the bundle takes (default: all)"
            )
            add_export_options(parser)

    def run(self) -> None:
        from gemma_edge.cli.export import run
        from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

        try:
            args = self.args
            paths = [args.model, *args.paths] if args.model else args.paths
            if not 1 <= len(paths) <= 2:
                raise UsageError(f"name a checkpoint and a bundle: optimum-cli export {NAME} -m ID OUT")
            args.source, args.out = paths[0], paths[1] if len(paths) == 2 else None
            if args.modalities is None:
                args.modalities = TASKS[args.task]
            code = run(args)
        except GemmaEdgeError as error:
            print(f"{NAME}: error: {error}", file=sys.stderr)
            code = error.exit_code
        sys.exit(code)


REGISTER_COMMANDS = [(GemmaEdgeExportCommand, ExportCommand)]
