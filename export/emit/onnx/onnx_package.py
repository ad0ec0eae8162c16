"""What graphs are built with: the package onnx or, where it is missing, stand-ins that lay out weights alone.

A plan needs the layout of a graph's weights, which follows from building the graph; so a board can plan an
export without onnx. The format "onnx" requires the package before it does anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class _Anything:
    """Takes every call, attribute and item, and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
else:
    try:
        from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
    except ModuleNotFoundError:
        ModelProto = NodeProto = TensorProto = ValueInfoProto = helper = numpy_helper = _Anything()

__all__ = [
    "ModelProto",
    "NodeProto",
    "TensorProto",
    "ValueInfoProto",
    "helper",
    "numpy_helper",
]
