"""What the LiteRT backend needs of the engine itself: a model, its packed weights in a file, and shared buffers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np
from ai_edge_litert.compiled_model import (
    CompiledModel,
    CpuOptions,
    Environment,
    EnvironmentOptions,
    Options,
    TensorBuffer,
)
from numpy.typing import NDArray

from gemma_edge.runtime.errors import BundleError

CACHE_VARIABLE = "GEMMA_EDGE_CACHE"
NOWHERE = os.path.join(os.devnull, "none")  # accelerators are looked for in folders: none of them is wanted
# Packed weights are a little larger than the file (sums of rows); this much must stay free beside them.
PACKED_FACTOR, ROOM = 1.2, 64 << 20


class Buffer:
    """A tensor's memory, seen by the engine and as an array.

    The Python wrapper copies on every read and write, which for a KV cache costs more than the model. The
    library beside it, of the same wheel, tells a buffer's address; whether that is right is tried out first.
    Where it is not, `push` and `pull` copy.
    """

    def __init__(self, tensor: TensorBuffer, shape: tuple[int, ...], dtype: type = np.float32) -> None:
        self.tensor = tensor
        self.array: NDArray[Any] = np.zeros(shape, dtype)
        tensor.write(self.array)
        shared = _host_memory(tensor, self.array)
        self.shared = shared is not None
        if shared is not None:
            self.array = shared

    def push(self) -> None:
        """Makes what was written to `array` the engine's."""
        if not self.shared:
            self.tensor.write(self.array)

    def pull(self) -> None:
        """Makes what the engine has written visible in `array`."""
        if not self.shared:
            self.array[...] = self.tensor.read(self.array.size, self.array.dtype.type).reshape(self.array.shape)


def _host_memory(tensor: TensorBuffer, like: NDArray[Any]) -> NDArray[Any] | None:
    """The buffer's memory as an array; None if it cannot be had. It holds zeros, as `like`."""
    functions = _c_api()
    if functions is None:
        return None
    pointer_of, host_memory = functions
    address = ctypes.c_void_p()
    if host_memory(pointer_of(tensor.capsule, b"LiteRtTensorBuffer"), ctypes.byref(address)) or not address.value:
        return None
    view = np.frombuffer((ctypes.c_char * like.nbytes).from_address(address.value), like.dtype)
    # A write through the wrapper must show; only the ends are tried, to touch no page of a large cache.
    pattern = like.reshape(-1)
    pattern[0], pattern[-1] = 3, 5
    tensor.write(like)
    same = (view[0], view[-1]) == (pattern[0], pattern[-1])
    like[...] = 0
    tensor.write(like)
    return view.reshape(like.shape) if same else None


@cache
def _c_api() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    try:
        library = ctypes.CDLL(os.path.join(ai_edge_litert.__path__[0], "libLiteRt.so"))
        host_memory = library.LiteRtGetTensorBufferHostMemory
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    except (OSError, AttributeError):
        return None
    host_memory.argtypes, host_memory.restype = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)], ctypes.c_int
    pointer_of.argtypes, pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return pointer_of, host_memory


def load_model(path: Path, digest: str, threads: int) -> CompiledModel:
    """The engine's model, its packed weights in a file; on the heap, with a warning, where no file can be.

    Args:
        digest: SHA-256 of the file; the packed weights are found by it.

    Raises:
        BundleError: the engine does not take the file.
    """
    packed = packed_weights(digest)
    building = None
    if packed is not None and not packed.exists():
        building = _writable(packed, path.stat().st_size)
        packed = building
    with engine_log() as log:
        try:
            options = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(packed or ""))
            model = CompiledModel.from_file(
                str(path), environment=_environment(), options=Options(cpu_options=options)
            )
        except Exception as error:  # the wrapper raises several types
            if building is not None:
                building.unlink(missing_ok=True)
            lines = [line for line in log() if "ERROR" in line] or [str(error)]
            raise BundleError(path, "graph", "a decoder that LiteRT loads", "; ".join(lines[-3:])) from None
    if building is not None and building.exists():
        # Under its name it is complete; it stays mapped.
        os.replace(building, packed_weights(digest) or building)
    return model


def packed_weights(digest: str) -> Path | None:
    """Where a model's packed weights are, or will be: in $GEMMA_EDGE_CACHE, by default below ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get(CACHE_VARIABLE) or os.path.join(home, "gemma-edge"))
    return folder / f"{digest[:32]}-{version('ai-edge-litert')}.xnnpack"


def _writable(packed: Path, size: int) -> Path | None:
    """A name to build the file under; None, after a warning, where it cannot be built."""
    remedy = f"the packed weights take anonymous memory instead. Set {CACHE_VARIABLE} to another folder"
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(packed.parent).free
        if free < PACKED_FACTOR * size + ROOM:
            warnings.warn(f"{packed.parent}: {free:,} bytes are free, too few; {remedy}", stacklevel=3)
            return None
        descriptor, name = tempfile.mkstemp(".building", packed.stem, packed.parent)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        warnings.warn(f"{packed.parent}: {error.strerror}; {remedy}", stacklevel=3)
        return None
    return Path(name)


@cache
def _environment() -> Environment:
    """One for the process, never destroyed: destroying it at exit writes to stderr."""
    made = Environment.create(options=EnvironmentOptions(NOWHERE, NOWHERE, NOWHERE))
    for thing in (made, made._capsule):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return made


@contextlib.contextmanager
def engine_log() -> Iterator[Callable[[], list[str]]]:
    """Keeps what the engine writes to stderr, a page of information for every model; gives its lines."""
    with tempfile.TemporaryFile() as file:

        def lines() -> list[str]:
            file.seek(0)
            return file.read().decode(errors="replace").splitlines()

        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
