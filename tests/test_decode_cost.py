"""What a decode step costs, in bytes and operators: a change that makes it heavier must say so.

tests/golden/decode_cost.json has the figures: bytes of weights that a step of E2B and E4B reads, by format
and recipe, and the operators of a step in a model of five layers. They depend on no CPU and no clock.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from ai_edge_litert.schema_py_generated import BuiltinOperator

from gemma_edge.export.exporter import plan_export
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights.recipe import list_recipes, load_recipe
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.tflite_reader import read_tflite
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

COSTS = Path(__file__).parent / "golden" / "decode_cost.json"
CONTEXT, CHUNK = 4096, 256


def bytes_a_token() -> dict[str, int]:
    """By model, format and recipe, where the format takes the recipe."""
    found = {}
    for size in ("e2b", "e4b"):
        config = Gemma3nConfig.from_dict(text_config(size))
        for form in ARTIFACT_FORMATS:
            for name in list_recipes():
                recipe = load_recipe(name)
                if not export_format(form).unsupported(config, recipe):
                    plan = plan_export(config, recipe, CONTEXT, CHUNK, form)
                    found[f"{size} {form} {name}"] = plan.bytes_per_token
    return found


def operators(bundles: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Operators of one decode step, by format."""
    graph = onnx.load(bundles["onnx"] / "decoder.onnx", load_external_data=False).graph
    model = read_tflite(bundles["tflite"] / "decoder.tflite")
    names = {code: name for name, code in vars(BuiltinOperator).items() if isinstance(code, int)}
    step = model.subgraphs[model.signatures["decode"].subgraph].operators
    return {
        "onnx": Counter(node.op_type for node in graph.node),
        "tflite": Counter(names[operator.code] for operator in step),
    }


def test_a_decode_step_costs_what_it_did(gate_bundles: dict[str, Path], tmp_path: Path) -> None:
    found: dict[str, Any] = {"bytes_a_token": bytes_a_token(), "operators": operators(gate_bundles)}
    made = tmp_path / COSTS.name
    made.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    known = json.loads(COSTS.read_text(encoding="utf-8"))
    changes = [
        f"{group}: {name}: {known[group].get(name)} before, {found[group].get(name)} now"
        for group in found
        for name in sorted(known[group] | found[group])
        if known[group].get(name) != found[group].get(name)
    ]
    assert not changes, f"{changes}: if they are meant, measure the speed and cp {made} {COSTS}"
