"""Checks of decoder.onnx that ONNX Runtime does not make: it would answer, and answer wrongly.

The file is walked as a protocol buffer, because the onnx package is not installed on a device. Weights lie in
files of their own, so a graph is small: 0.34 MB for E2B, read in 17 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from gemma_edge.runtime.artifacts.manifest import EXPORT_AGAIN
from gemma_edge.runtime.artifacts.protobuf import fields
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.families.model_family import TextConfig

MAX_GRAPH_BYTES = 32 << 20
_MODEL_GRAPH, _GRAPH_NODE, _NODE_KIND, _NODE_ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_INT = 7, 1, 4, 5, 1, 3
_UNBOUNDED = -1  # the operator's own value where the attribute is absent


def check_windows(path: Path, config: TextConfig) -> None:
    """Compares the attention windows in the graph of `path` with those of the manifest's config.

    Raises:
        BundleError: they differ, or the file is no model, or it is larger than `MAX_GRAPH_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise BundleError(path, "size", f"at most {MAX_GRAPH_BYTES} bytes", size, EXPORT_AGAIN)

    def fail(field: str, expected: object, got: object) -> NoReturn:
        raise BundleError(path, field, expected, got, EXPORT_AGAIN)

    def children(message: bytes, number: int, name: str) -> Iterator[bytes]:
        return (v for n, v in fields(message, name, fail) if n == number and isinstance(v, bytes))

    found = []
    for graph in children(path.read_bytes(), _MODEL_GRAPH, "model"):
        for node in children(graph, _GRAPH_NODE, "graph"):
            if b"GroupQueryAttention" in children(node, _NODE_KIND, "node"):
                attributes = (
                    dict(fields(attribute, "attribute", fail))
                    for attribute in children(node, _NODE_ATTRIBUTE, "node")
                )
                windows = {a.get(_ATTRIBUTE_NAME): a.get(_ATTRIBUTE_INT, 0) for a in attributes}
                found.append(windows.get(b"local_window_size", _UNBOUNDED))
    layers = range(config.num_hidden_layers)
    expected = [config.sliding_window if config.is_sliding(layer) else _UNBOUNDED for layer in layers]
    for layer, (ours, its) in enumerate(zip(expected, found, strict=False)):
        if its not in (ours, ours % 2**64):
            fail(f"attention window of layer {layer}", f"{ours}, as in the manifest", its)
    if len(found) != len(expected):
        fail("attention operators", f"one for each of {len(expected)} layers", len(found))
