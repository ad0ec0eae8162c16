"""The weights of a .tflite as XNNPACK packs them, in a file that is made once and mapped from then on.

The engine aborts its process when the disk fills while it packs. So a process of its own packs: whatever ends
it, the model still runs, with its packed weights in anonymous memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

from gemma_edge.runtime.engines.litert_version import litert_version
from gemma_edge.runtime.errors import BundleError, DeviceError
from gemma_edge.runtime.files.cache_folder import CACHE_VARIABLE, cache_folder
from gemma_edge.runtime.files.file_digest import remembered_sha256
from gemma_edge.runtime.files.kept_files import keep, kept
from gemma_edge.runtime.host.cpu_fingerprint import cpu_fingerprint, has_usual_instructions

PACKED_FACTOR = 1.2  # packed weights are a little larger than the file: sums of rows
REFUSED = 3  # exit code: the engine does not take the model
_PACK = "import sys; from gemma_edge.runtime.engines.litert_model import pack; pack(*sys.argv[1:])"


class _RefusedError(Exception):
    """The engine does not take the model, with or without a file."""


def packed_weights(path: Path, recorded: str, threads: int) -> Path | None:
    """The file of a model's packed weights, made now if need be; None, after a warning, where it cannot be.

    Args:
        path: the .tflite.
        recorded: SHA-256 that the bundle records of it; "" for none.

    Raises:
        BundleError: the file has another SHA-256.
        DeviceError: LiteRT needs instructions that this CPU lacks.
    """
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        digest = remembered_sha256(path)
        if recorded and digest != recorded:
            remedy = "The file was altered: copy the bundle again."
            raise BundleError(path, "sha256", recorded, digest, remedy)
        # For this CPU's kernels: XNNPACK rewrites a file made for others, under whoever has it mapped.
        before = f"{digest[:32]}-{litert_version()}-{cpu_fingerprint()}-"
        after = ".xnnpack"
        size = int(PACKED_FACTOR * path.stat().st_size)
        return kept(before, after) or keep(
            before, after, size, lambda building: _pack_apart(path, building, threads)
        )
    except _RefusedError:
        return None  # whoever loads it without a file learns why
    except OSError as error:
        if not has_usual_instructions():
            with contextlib.suppress(_RefusedError):
                _run_apart(path, None, threads)  # it packs for nothing, so that nobody dies here
        remedy = f"the packed weights take anonymous memory instead. Set {CACHE_VARIABLE} to another folder"
        warnings.warn(f"{cache_folder()}: {error.strerror}; {remedy}", stacklevel=3)
        return None


def _pack_apart(path: Path, building: Path, threads: int) -> None:
    """Packs in a process of its own. Raises OSError where that writes no file."""
    done = _run_apart(path, building, threads)
    if done.returncode or not building.exists():
        reason = f"the process that packs weights ended with exit code {done.returncode}"
        if "weight_cache" in done.stderr:  # the engine's file of it could not be written
            reason = "the disk became full while weights were packed"
        raise OSError(errno.EIO, reason, str(building))


def _run_apart(path: Path, building: Path | None, threads: int) -> subprocess.CompletedProcess[str]:
    """The process that packs, into a file or into its own memory; it ends with this one."""
    argv = [sys.executable, "-c", _PACK, str(path), str(building or ""), str(threads), str(os.getpid())]
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode == -signal.SIGILL:  # which would end this process as well
        raise DeviceError(
            "LiteRT ended with an illegal instruction: this CPU lacks instructions that LiteRT "
            f"{litert_version()} needs. Run an export with --format onnx instead"
        )
    if done.returncode == REFUSED:
        raise _RefusedError
    return done
