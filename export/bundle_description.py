"""A bundle's plan and quality as text for people: for `inspect`, and for model cards."""

from __future__ import annotations

from typing import Any

from gemma_edge.export.gate.parity import AGREEMENT_SHAPE, Agreement
from gemma_edge.export.plan_table import PLAN_SHAPE, format_plan
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, printable
from gemma_edge.runtime.files.json_shape import misfit


def plan_lines(bundle: Bundle) -> list[str]:
    """The plan's table. Raises BundleError when the manifest's plan is malformed."""
    plan = bundle.member("plan", dict)
    _check(bundle, "plan", plan, PLAN_SHAPE)
    return [printable(line) for line in format_plan(plan).splitlines()]


def agreement_lines(bundle: Bundle) -> list[str]:
    """What the gate found, in figures and in words. Raises BundleError when it is malformed."""
    if not (agreement := bundle.manifest.get("agreement")):
        return ["not verified: exported with --no-verify"]
    _check(bundle, "agreement", agreement, AGREEMENT_SHAPE)
    read = Agreement.from_dict(agreement)
    return [*read.summary().splitlines(), read.in_words(str(bundle.member("recipe", dict).get("name", "")))]


def _check(bundle: Bundle, name: str, value: Any, shape: Any) -> None:
    if found := misfit(value, shape, name):
        raise BundleError(bundle.container.manifest_path, found[0], found[1], "something else")
