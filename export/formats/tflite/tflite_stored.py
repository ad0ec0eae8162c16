"""The weights of a .tflite by name, found by what the file itself says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.export.weights.stored_tensor import Region
from gemma_edge.runtime.artifacts.tflite_reader import Span, Subgraph, Tensor, TfliteModel, read_tflite
from gemma_edge.runtime.errors import BundleError

BITS = {"float32": 32, "int8": 8, "int4": 4}


def tflite_matrices(path: Path) -> dict[str, StoredMatrix]:
    """Every weight of the model in a file, by name: what its subgraphs share has one name in all of them.

    Raises:
        BundleError: two subgraphs have different bytes under one name.
    """
    model = read_tflite(path)
    matrices: dict[str, StoredMatrix] = {}
    for graph in model.subgraphs:
        scales = {
            t.quantization.scale_tensor for t in graph.tensors if t.quantization and t.quantization.block
        }
        for index, tensor in enumerate(graph.tensors):
            if tensor.data is None or index in scales or tensor.name.startswith(f"{graph.name}/"):
                continue  # no weight: an activation, scales, or a constant
            matrix = _matrix(model, graph, tensor, tensor.data)
            first = matrices.setdefault(tensor.name, matrix)
            if first != matrix and not _same(first, matrix):
                raise BundleError(
                    path, tensor.name, "one weight for all signatures", f"another in {graph.name}"
                )
    return matrices


def _same(one: StoredMatrix, other: StoredMatrix) -> bool:
    """Whether two differ in the place of their scales alone: each signature has its own copy of a row's."""
    if replace(one, scales=None) != replace(other, scales=None):
        return False
    return np.array_equal(one.scale_values(), other.scale_values())


def _matrix(model: TfliteModel, graph: Subgraph, tensor: Tensor, data: Span) -> StoredMatrix:
    bits, scaling = BITS.get(tensor.type, 0), tensor.quantization
    region = Region(data.offset, data.length)
    if bits == 32:
        return StoredMatrix(model.path, tensor.shape, bits, region)
    if not bits or scaling is None:
        model.fail(tensor.name, "a weight of float32, int8 or int4", tensor.type)
    if scaling.block:
        blocks = graph.tensors[scaling.scale_tensor].data
        assert blocks is not None  # as the reader checks
        place, kind = blocks, "<f2"
    else:
        assert scaling.scales is not None
        place, kind = scaling.scales, "<f4"
    scales = Region(place.offset, place.length)
    return StoredMatrix(model.path, tensor.shape, bits, region, scaling.block, scales, kind, signed=True)
