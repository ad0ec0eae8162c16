"""The model card of a bundle: README.md, with the metadata that a model hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gemma_edge.export.bundle_description import agreement_lines, plan_lines
from gemma_edge.export.plan_table import NAMES, TITLES
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import UsageError, printable

MARK = "<!-- written by gemma-edge push -->"  # a card that has lost it is somebody's own
LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")  # an id such as gemma or apache-2.0
# What a hub calls a model that takes these.
PIPELINES = {(): "text-generation", ("vision",): "image-text-to-text"}
LIBRARY = "gemma-edge"


def model_card(
    bundle: Bundle,
    address: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    results: str = "",
) -> str:
    """The card of a bundle that will be at `address`, the `owner/name` of a hub.

    Args:
        license: of the weights, an id such as "gemma"; None for what the checkpoint's card stated.
        base_model: the checkpoint's id on the hub; None for the id that the bundle was exported by.
        results: measurements as markdown, beside those of the manifest.

    Raises:
        UsageError: nothing states the licence, or it is none of a hub's ids.
        BundleError: the manifest is malformed.
    """
    license = license or bundle.manifest.get("license")
    if not isinstance(license, str) or not LICENSE.fullmatch(license):
        raise UsageError(
            f"{bundle.path}: the licence of the weights must be an id: add --license gemma, or another"
        )
    if base_model is None:
        base_model = bundle.manifest.get("base_model")
    recipe = bundle.member("recipe", dict)
    head: dict[str, Any] = {"library_name": LIBRARY, "license": license}
    if isinstance(base_model, str):
        head |= {"base_model": base_model, "base_model_relation": "quantized"}
    head["pipeline_tag"] = PIPELINES.get(tuple(sorted(bundle.modalities)), "any-to-any")
    head["tags"] = [LIBRARY, bundle.format, bundle.family.name, str(recipe.get("name")), "on-device"]
    # JSON is YAML, and quotes whatever a manifest says.
    metadata = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    lines = ["---", *metadata, "---", "", MARK, "", *_body(bundle, address, recipe, base_model)]
    if results:
        lines += ["", "### Speed and memory", "", results.strip()]
    return "\n".join(lines) + "\n"


def _body(bundle: Bundle, address: str, recipe: dict[str, Any], base_model: object) -> list[str]:
    takes = ", ".join(["text", *(NAMES[kind] for kind in bundle.modalities)])
    source = bundle.member("source", dict)
    made = f"{printable(bundle.manifest.get('generator'))} exported it"
    made += f" from {printable(base_model)}" if isinstance(base_model, str) else ""
    example = bundle.manifest.get("example")
    example = example if isinstance(example, str) and "\n" not in example else "Why is the sky blue?"
    question = example.replace("'", "’")
    name = address.rpartition("/")[2]
    return [
        f"# {name}",
        "",
        f"A bundle for gemma-edge: it takes {takes}, and answers in text. {made} "
        f"(revision `{printable(source.get('revision'), 16)}`).",
        "",
        "```sh",
        f"gemma-edge pull {address}",
        f"gemma-edge run {name} '{printable(question)}'",
        "```",
        "",
        "## Recipe",
        "",
        f"`{printable(recipe.get('name'))}`: {printable(recipe.get('description'), 400)}",
        "",
        *_parts(recipe),
        "",
        f"KV cache {bundle.kv_cache}; planned for {bundle.context:,} tokens of context.",
        "",
        "## Plan",
        "",
        "```",
        *plan_lines(bundle),
        "```",
        "",
        "## Measured",
        "",
        "The bundle was compared with its checkpoint:",
        "",
        *(f"- {printable(line, 400)}" for line in agreement_lines(bundle)),
    ]


def _parts(recipe: dict[str, Any]) -> Sequence[str]:
    parts = recipe.get("parts")
    rows = ["| part | bits | group |", "|---|---|---|"]
    for part, stored in parts.items() if isinstance(parts, dict) else ():
        if isinstance(stored, dict):
            cells = (TITLES.get(part, part), stored.get("bits"), stored.get("group") or "")
            rows.append("| " + " | ".join(printable(cell).replace("|", "") for cell in cells) + " |")
    return rows
