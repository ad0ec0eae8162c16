"""Turns a checkpoint into a bundle, and proves that both agree.

    from gemma_edge.export import export_bundle, verify_bundle

    exported = export_bundle("ckpt/", "out/", recipe="int4", context=4096, ceiling=2 << 30)
    print(exported.agreement)

Importing this package loads none of its modules; a name does when it is first used. It needs the extra
`export`: pip install ".[export]" in a clone of gemma-edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_edge.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from gemma_edge.export.checkpoint.checkpoint import Checkpoint
    from gemma_edge.export.device_plans import DevicePlan, Machine, Wishes, rank_plans
    from gemma_edge.export.exporter import Exported, export_bundle, plan_export
    from gemma_edge.export.gate.parity import Agreement, verify_bundle
    from gemma_edge.export.plan import Plan
    from gemma_edge.export.slicer import Sliced, slice_checkpoint
    from gemma_edge.export.synth.synth_checkpoint import synthesize
    from gemma_edge.export.weights.recipe import Recipe, list_recipes, load_recipe
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Agreement": "gate.parity",
            "Checkpoint": "checkpoint.checkpoint",
            "DevicePlan": "device_plans",
            "Exported": "exporter",
            "Machine": "device_plans",
            "Plan": "plan",
            "Recipe": "weights.recipe",
            "Sliced": "slicer",
            "Wishes": "device_plans",
            "export_bundle": "exporter",
            "list_recipes": "weights.recipe",
            "load_recipe": "weights.recipe",
            "plan_export": "exporter",
            "rank_plans": "device_plans",
            "slice_checkpoint": "slicer",
            "synthesize": "synth.synth_checkpoint",
            "verify_bundle": "gate.parity",
        },
    )

__all__ = [
    "Agreement",
    "Checkpoint",
    "DevicePlan",
    "Exported",
    "Machine",
    "Plan",
    "Recipe",
    "Sliced",
    "Wishes",
    "export_bundle",
    "list_recipes",
    "load_recipe",
    "plan_export",
    "rank_plans",
    "slice_checkpoint",
    "synthesize",
    "verify_bundle",
]
