"""What to type where a package of an extra is missing."""

from __future__ import annotations

import importlib

from gemma_edge.runtime.errors import UsageError

# Modules whose distribution has another name than the module with hyphens.
_DISTRIBUTIONS = {"google": "protobuf", "PIL": "pillow"}


def distribution(module: str) -> str:
    """The name under which pip knows the package of a module such as "litert_lm_builder.runtime"."""
    top = module.partition(".")[0]
    return _DISTRIBUTIONS.get(top, top.replace("_", "-"))


def install_hint(extra: str) -> str:
    """The command that installs an extra; gemma-edge is on no index, so it runs in a clone."""
    return f'pip install ".[{extra}]" in a clone of gemma-edge'


def require(module: str, extra: str, what: str) -> None:
    """Raises UsageError unless a module of an extra is there; `what` needs it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        raise UsageError(f"{what} needs {distribution(module)}: {install_hint(extra)}") from None
