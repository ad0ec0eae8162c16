"""An ONNX decoder with its weights packed, in a file that is made on request and mapped from then on.

The file is what ONNX Runtime saves: the external data of an optimized graph, with each weight as it was and
as it is packed. Behind them lie the graph and its size, so that one file holds all.

At a load, ONNX Runtime packs one weight after the other, and maps the packed copy of a weight only if both
have the same hash. So a file that another CPU packed takes memory, but never gives another result.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

import onnxruntime as ort

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.onnx_files import DECODER, DECODER_DATA
from gemma_edge.runtime.artifacts.protobuf import replaced
from gemma_edge.runtime.engines.onnx_session import open_session, session_options
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.file_digest import remembered_sha256
from gemma_edge.runtime.files.kept_files import keep, kept
from gemma_edge.runtime.host.cpu_fingerprint import cpu_fingerprint

KEPT_FACTOR = 2.25  # of the weights' file: each weight as it was and packed, at most 6 bits for 5
ALIGNMENT = 4096  # bytes, as ONNX Runtime aligns large ones
_EXTERNAL_VALUE = (7, 5, 13, 2)  # fields: the model's graph, its initializers, their external data, a value
_PACKED = re.compile(rb"\w+\+\d+(\|\d+;\d+;\d+)+")  # kernel and hash, then places in the file
_SUFFIX = ".onnxpacked"
_SIZE = struct.Struct("<Q")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOLDER = "session.model_external_initializers_file_folder_path"


def pack_graph(bundle: Bundle) -> Path:
    """The kept file of a bundle's decoder, made now if need be.

    Raises:
        BundleError: the weights have another SHA-256 than recorded, or ONNX Runtime does not take the graph.
        OSError: the cache folder cannot be written, or its disk is too full.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    before = _checked(bundle)
    size = int(KEPT_FACTOR * bundle.file(DECODER_DATA).stat().st_size)
    return kept(before, _SUFFIX) or keep(before, _SUFFIX, size, lambda building: _save(bundle, building))


def packed_session(bundle: Bundle, options: Callable[[], ort.SessionOptions]) -> ort.InferenceSession | None:
    """A session over the kept file; None where none is kept, or ONNX Runtime does not take it.

    Args:
        options: makes those of the session.

    Raises:
        BundleError: a file is kept, and the bundle's weights have another SHA-256 than recorded.
    """
    before = _before(bundle)
    if not before or not any(cache_folder().glob(f"{before}*{_SUFFIX}")):
        return None  # without hashing the weights
    try:
        path = kept(_checked(bundle), _SUFFIX)
        graph = path and _graph_in(path)
    except OSError:
        return None
    if not path or not graph:
        return None
    ours = options()
    ours.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimized
    ours.add_session_config_entry(_FOLDER, str(path.parent))
    try:
        return open_session(graph.replace(_data_name(before).encode(), path.name.encode()), ours)
    except Exception:  # onnxruntime raises many types of its own
        return None


def _before(bundle: Bundle) -> str:
    """The beginning of the file's name: for these weights and this graph, this version and this CPU.

    Empty where the bundle has no such files, or a manifest that could name any file by their hash.
    """
    digests = [bundle.files[name].sha256 for name in (DECODER_DATA, DECODER) if name in bundle.files]
    if len(digests) < 2 or not all(_SHA256.fullmatch(digest) for digest in digests):
        return ""
    weights, graph = digests
    return f"{weights[:32]}-{graph[:8]}-{ort.__version__}-{cpu_fingerprint()}-"


def _checked(bundle: Bundle) -> str:
    """As `_before`, after the files were found to be the recorded ones."""
    for name in (DECODER_DATA, DECODER):
        digest = remembered_sha256(bundle.file(name))
        recorded = bundle.files[name].sha256
        if digest != recorded:
            remedy = "The file was altered: copy the bundle again."
            raise BundleError(bundle.file(name), "sha256", recorded, digest, remedy)
    return _before(bundle)


def _data_name(before: str) -> str:
    """The name under which the external data are saved, which the graph holds; a load replaces it.

    It is as long as a kept file's name, and ends as names of unfinished files do.
    """
    return f"{before}{'0' * 23}{_SUFFIX}.building"


def _save(bundle: Bundle, building: Path) -> None:
    """Writes the file. Raises OSError where it cannot be written, BundleError where the graph is refused."""
    data = building.with_name(_data_name(_before(bundle)))
    graph = building.with_name(f"graph-{data.name}")
    options = session_options(None)
    options.optimized_model_filepath = str(graph)
    entries = {
        "session.optimized_model_external_initializers_file_name": data.name,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        open_session(bundle.file(DECODER), options)
        with data.open("r+b") as file:
            encoded = _aligned(graph.read_bytes(), file)
            file.seek(0, os.SEEK_END)
            file.write(encoded + _SIZE.pack(len(encoded)))
        os.replace(data, building)
    except OSError:
        raise
    except Exception as error:  # onnxruntime raises many types of its own
        if data.exists():
            raise OSError(errno.EIO, "the disk is full, or files may not grow so large", str(data)) from None
        raise BundleError(
            bundle.file(DECODER), "graph", "a decoder that ONNX Runtime loads", str(error)
        ) from None
    finally:
        data.unlink(missing_ok=True)
        graph.unlink(missing_ok=True)


def _aligned(graph: bytes, data: BinaryIO) -> bytes:
    """The graph with every packed weight at a multiple of `ALIGNMENT`, those at others copied to the end.

    ONNX Runtime aligns only what is larger than 1 MiB. Its kernels find the parts of a packed weight by the
    address, so at another one they compute with other bytes, or end the process.
    """

    def moved(place: bytes) -> bytes:
        begin, size, *rest = place.split(b";")
        if int(begin) % ALIGNMENT == 0:
            return place
        data.seek(int(begin))
        content = data.read(int(size))
        end = data.seek(0, os.SEEK_END)
        begin = b"%d" % (end + -end % ALIGNMENT)
        data.seek(int(begin))
        data.write(content)
        return b";".join((begin, size, *rest))

    def change(value: bytes) -> bytes:
        if not _PACKED.fullmatch(value):
            return value
        key, *places = value.split(b"|")
        return b"|".join((key, *map(moved, places)))

    def fail(field: str, expected: object, got: object) -> NoReturn:
        raise BundleError("the optimized graph", field, expected, got)

    return replaced(graph, _EXTERNAL_VALUE, change, "graph", fail)


def _graph_in(path: Path) -> bytes:
    """The graph in a kept file; nothing if it does not lie there."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - _SIZE.size
        if end < 0:
            return b""
        file.seek(end)
        (size,) = _SIZE.unpack(file.read())
        if size > end:
            return b""
        file.seek(end - size)
        return file.read(size)
