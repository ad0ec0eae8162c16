"""What a script does around its work as a process: exit codes, no traceback, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import GemmaEdgeError

ERROR = "gemma-edge: error: "  # begins the line that says what went wrong, as the command line's does


def run_script(main: Callable[[], int]) -> int:
    """The exit code of a script; errors are one line on stderr and a code of `runtime.errors`."""
    try:
        return main()
    except GemmaEdgeError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


progress = tell  # stdout is for answers
