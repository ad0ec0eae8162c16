"""The weights of a decoder.onnx by name, found by what the graph itself says of them."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.export.emit.onnx.onnx_package import ModelProto, TensorProto
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.export.weights.stored_tensor import Region
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError


def read_graph(path: Path) -> ModelProto:
    """The model in a file, its external weights left where they are."""
    return ModelProto.FromString(path.read_bytes())


def onnx_matrices(bundle: Bundle, file: str) -> dict[str, StoredMatrix]:
    """Every external weight of the graph in a file of a bundle, by name.

    Raises:
        BundleError: a weight is not one that an export writes.
    """
    path = bundle.file(file)
    graph = read_graph(path).graph
    external = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    matrices = {}
    scales = set()
    for node in graph.node:
        integers = node.op_type == "MatMulIntegerToFloat"
        if not integers and node.op_type != "MatMulNBits":
            continue
        name, scale_name = node.input[1], node.input[3 if integers else 2]
        if name in matrices:
            continue
        size = {a.name: a.i for a in node.attribute}
        if name not in external or scale_name not in external:
            raise BundleError(path, name, "external weights and scales", "others")
        scales.add(scale_name)
        data_file, data = _place(bundle, external[name])
        _, scale_region = _place(bundle, external[scale_name])
        if integers:
            shape = tuple(reversed(external[name].dims))
            matrices[name] = StoredMatrix(
                data_file, shape, 8, data, 0, scale_region, signed=True, transposed=True
            )
            continue
        matrices[name] = StoredMatrix(
            data_file, (size["N"], size["K"]), size["bits"], data, size["block_size"], scale_region
        )
    for name, tensor in external.items():
        if name not in matrices and name not in scales:
            data_file, data = _place(bundle, tensor)
            matrices[name] = StoredMatrix(data_file, tuple(tensor.dims), 32, data)
    return matrices


def _place(bundle: Bundle, tensor: TensorProto) -> tuple[Path, Region]:
    said = {entry.key: entry.value for entry in tensor.external_data}
    return bundle.file(said["location"]), Region(int(said["offset"]), int(said["length"]))
