"""What the LiteRT backend needs of the engine: a model, its packed weights in a file, and shared buffers."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
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

from gemma_edge.runtime.engines.packed_weights import REFUSED, packed_weights
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.host.parent_process import end_with_parent

NOWHERE = os.path.join(os.devnull, "none")  # accelerators are looked for in folders: none of them is wanted
SLACK = 256  # bytes that the engine may add to a buffer to align it


class Buffer:
    """A tensor's memory, seen by the engine and as an array.

    The Python wrapper copies on every read and write, which for a KV cache costs more than the model. The
    library beside it, of the same wheel, tells a buffer's address. Where it does not, `push` and `pull` copy.
    """

    def __init__(self, tensor: TensorBuffer, shape: tuple[int, ...], dtype: type = np.float32) -> None:
        self.tensor = tensor
        shared = _host_memory(tensor, shape, dtype)
        self.shared = shared is not None
        self.array: NDArray[Any] = np.empty(shape, dtype) if shared is None else shared
        self.array[...] = 0

    def push(self) -> None:
        """Makes what was written to `array` the engine's."""
        if not self.shared:
            self.tensor.write(self.array)

    def pull(self) -> None:
        """Makes what the engine has written visible in `array`."""
        if not self.shared:
            self.array[...] = self.tensor.read(self.array.size, self.array.dtype.type).reshape(
                self.array.shape
            )


def _host_memory(tensor: TensorBuffer, shape: tuple[int, ...], dtype: type) -> NDArray[Any] | None:
    """The buffer's memory as an array; None if it cannot be had."""
    functions = _c_api()
    if functions is None:
        return None
    pointer_of, size_of, host_memory = functions
    handle = pointer_of(tensor.capsule, b"LiteRtTensorBuffer")
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    bytes_needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # A library that understood the buffer differently would hardly tell its size.
    if size_of(handle, ctypes.byref(size)) or not bytes_needed <= size.value < bytes_needed + SLACK:
        return None
    if host_memory(handle, ctypes.byref(address)) or not address.value:
        return None
    memory = memoryview((ctypes.c_char * bytes_needed).from_address(address.value)).cast("B")
    return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)


def handle_of(tensor: TensorBuffer) -> int:
    """A buffer as the library's C functions take it. Raises RuntimeError without that library."""
    if (functions := _c_api()) is None:
        raise RuntimeError("libLiteRt.so lacks functions of tensor buffers")
    handle: int = functions[0](tensor.capsule, b"LiteRtTensorBuffer")
    return handle


@cache
def _c_api() -> tuple[Callable[..., Any], ...] | None:
    """PyCapsule_GetPointer, LiteRtGetTensorBufferSize and LiteRtGetTensorBufferHostMemory."""
    try:
        library = ctypes.CDLL(os.path.join(ai_edge_litert.__path__[0], "libLiteRt.so"))
        size_of, host_memory = library.LiteRtGetTensorBufferSize, library.LiteRtGetTensorBufferHostMemory
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    except (OSError, AttributeError):
        return None
    for function, result in ((size_of, ctypes.c_size_t), (host_memory, ctypes.c_void_p)):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.POINTER(result)], ctypes.c_int
    pointer_of.argtypes, pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return pointer_of, size_of, host_memory


def load_model(path: Path, recorded: str, threads: int) -> CompiledModel:
    """The engine's model, its packed weights in a file; on the heap, with a warning, where no file can be.

    Args:
        recorded: SHA-256 that the bundle records of the file; "" for none.

    Raises:
        BundleError: the file is not the recorded one, or the engine does not take it.
        DeviceError: LiteRT needs instructions that this CPU lacks.
    """
    packed = packed_weights(path, recorded, threads)
    with engine_log() as log:
        try:
            return compile_model(path, packed, threads)
        except Exception as error:  # the wrapper raises several types
            lines = [line for line in log() if "ERROR" in line] or [str(error)]
            raise BundleError(path, "graph", "a model that LiteRT loads", "; ".join(lines[-3:])) from None


def compile_model(path: Path, packed: Path | None, threads: int) -> CompiledModel:
    """The engine's model. It reads packed weights from the file `packed`, or writes them there if it is
    absent.
    """
    options = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(packed or ""))
    return CompiledModel.from_file(
        str(path), environment=_environment(), options=Options(cpu_options=options)
    )


def pack(path: str, building: str, threads: str, parent: str) -> None:
    """In the process that packs: writes the packed weights, unless `building` is empty, and ends without the
    engine's farewell.
    """
    end_with_parent(int(parent))
    try:
        compile_model(Path(path), Path(building) if building else None, int(threads))
    except Exception as error:  # the wrapper raises several types
        print(error, file=sys.stderr, flush=True)
        os._exit(REFUSED)
    os._exit(0)


@cache
def _environment() -> Environment:
    """One for the process, never destroyed: destroying it at exit writes to stderr."""
    made = Environment.create(options=EnvironmentOptions(NOWHERE, NOWHERE, NOWHERE))
    for thing in (made, made._capsule):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return made


@contextlib.contextmanager
def engine_errors(path: Path) -> Iterator[None]:
    """Around what makes the engine allocate tensors: its refusals become BundleErrors, of `path`."""
    try:
        yield
    except RuntimeError as error:
        remedy = "`gemma-edge inspect --check` finds damage; export the checkpoint again."
        raise BundleError(path, "graph", "a model that LiteRT runs", error, remedy) from None


def run_signature(
    path: Path,
    model: CompiledModel,
    signature: int,
    inputs: list[TensorBuffer],
    outputs: list[TensorBuffer],
) -> None:
    """`run_by_index`. Raises BundleError, of `path`, where the engine cannot: it allocates tensors now."""
    with engine_errors(path):
        model.run_by_index(signature, inputs, outputs)


def run_first(
    path: Path, model: CompiledModel, signature: int, inputs: list[TensorBuffer], outputs: list[TensorBuffer]
) -> None:
    """`run_by_index`, the first time: the wrapper then makes another environment, which writes to stderr.

    It does so again when the process ends, where nobody else has anything to say any more.

    Raises:
        BundleError: the engine cannot run the model of `path`; it allocates tensors now.
    """
    with engine_log():
        run_signature(path, model, signature, inputs, outputs)
    _silence_exit()


@cache
def _silence_exit() -> None:
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


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
