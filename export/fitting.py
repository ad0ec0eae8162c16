"""Which recipe and context of a model fit into a machine's memory: plans tried from the best one down."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gemma_edge.export.exporter import plan_export
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.plan import Plan
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.model_family import TextConfig

RECIPES = ("int8", "int4")  # the most exact first
CONTEXTS = (32_768, 8_192, 4_096, 2_048, 1_024, 512)
CHUNK = 128


def fitting_plans(
    config: TextConfig,
    memory: int,
    format: str,
    towers: Mapping[Kind, Tower] = MappingProxyType({}),
) -> list[Plan]:
    """For each recipe the plan with the longest context that fits into `memory` bytes; no weight is read.

    Raises:
        UsageError: the format needs a package that is not installed.
    """
    most = config.max_position_embeddings
    contexts = [each for each in CONTEXTS if each <= most] or [most]
    found = []
    for recipe in map(load_recipe, RECIPES):
        for context in contexts:
            plan = plan_export(config, recipe, context, CHUNK, format, towers)
            if plan.needed_bytes <= memory:
                found.append(plan)
                break
    return found
