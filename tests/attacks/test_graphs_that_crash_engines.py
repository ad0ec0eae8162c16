"""Attack: a graph that our reader would accept and the engine dies of, with sizes and hashes made right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ai_edge_litert import schema_py_generated as schema
from fuzz.valid_inputs import SMALL

from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.tflite_reader import read_tflite
from gemma_edge.runtime.errors import BundleError

S: Any = schema
FULLY_CONNECTED_OPTIONS = 8


def test_an_operator_with_the_options_of_another(tmp_path: Path) -> None:
    """LiteRT reads the options as the operator's own: a segmentation fault."""
    checkpoint = synthesize(tmp_path / "checkpoint", config=SMALL, encoders=True, progress=False).path
    export_bundle(checkpoint, tmp_path / "b", recipe="int8", format="tflite", context=64, verify=False)
    for file in sorted((tmp_path / "b").glob("*coder.tflite")) + sorted(
        (tmp_path / "b").glob("[av]*.tflite")
    ):
        read_tflite(file)
    path = tmp_path / "b" / "decoder.tflite"
    data = bytearray(path.read_bytes())
    graph = S.Model.GetRootAs(data, 0).Subgraphs(0)
    operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    damaged = [o for o in operators if o.BuiltinOptionsType() == FULLY_CONNECTED_OPTIONS][-1]
    other = next(o for o in operators if o.BuiltinOptionsType() not in (0, FULLY_CONNECTED_OPTIONS))
    at = damaged._tab.Pos + damaged._tab.Offset(4)  # its opcode_index
    data[at : at + 4] = other.OpcodeIndex().to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BundleError, match="builtin_options_type"):
        read_tflite(path)
