"""Slices of Gemma 3n: what a checkpoint with narrower FFNs and fewer layers takes of each tensor and field.

The FFNs are nested (MatFormer): their first columns are an FFN too. A layer can be left out, with its columns
of the per-layer table, unless layers that stay read its keys and values.
"""

from __future__ import annotations

import difflib
import tomllib
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from gemma_edge.export.model.model_slice import Cut, Slice, parse_layers, parse_slice, parse_widths, spans_of
from gemma_edge.export.model.tensor_spec import PLE_NAME
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

Json = dict[str, Any]
PUBLISHED = Path(__file__).with_name("gemma3n_slices.toml")
BY_LAYER = ("per_layer_model_projection.weight",)  # their rows are blocks, one for each layer


def resolve(config: Gemma3nConfig, wanted: Slice | str) -> Slice:
    """See `Slicing`."""
    chosen = parse_slice(wanted) if isinstance(wanted, str) else wanted
    if isinstance(chosen, str):
        return _named(config, chosen)
    layers = config.num_hidden_layers
    if chosen.skipped and chosen.skipped[-1] >= layers:
        raise UsageError(
            f"slice {chosen}: the model has layers 0 to {layers - 1}, and no {chosen.skipped[-1]}"
        )
    kept = kept_layers(config, chosen)
    _check_sharing(config, chosen, kept)
    own = [config.intermediate_size[layer] for layer in kept]
    widths = list(chosen.widths) or own
    if len(widths) == 1:
        widths = [min(widths[0], width) for width in own] if max(own) >= widths[0] else widths * len(kept)
    if len(widths) != len(kept):
        raise UsageError(
            f"slice {chosen}: {len(widths)} widths for {len(kept)} layers that stay: give one, or one each"
        )
    for layer, width, most in zip(kept, widths, own, strict=True):
        if width > most:
            raise UsageError(
                f"slice {chosen}: layer {layer} has an FFN of {most}, which cannot become {width}"
            )
    if widths == own and not chosen.skipped:
        raise UsageError(f"slice {chosen}: takes nothing away from this model")
    return _with_quality(config, Slice(tuple(widths), chosen.skipped))


def slices(config: Gemma3nConfig) -> list[Slice]:
    """See `Slicing`. Google's table is of E4B; another model is at most one of its slices."""
    published, table = _published()
    if config.intermediate_size == (table["width"],) * table["layers"]:
        return published
    owners = table["layers"] - config.num_hidden_layers + config.num_kv_shared_layers
    same = [s for s in published if s.widths == config.intermediate_size and owners == table["sharing"]]
    return [replace(each, skipped=()) for each in same]


def config_json(data: Json, config: Gemma3nConfig, chosen: Slice) -> Json:
    """See `Slicing`. Lists are written out, since their defaults depend on the number of layers."""
    kept = kept_layers(config, chosen)
    text = data.get("text_config")
    fields = {
        "num_hidden_layers": len(kept),
        "intermediate_size": list(chosen.widths),
        "layer_types": [config.layer_types[layer] for layer in kept],
        "activation_sparsity_pattern": [config.activation_sparsity[layer] for layer in kept],
        "num_kv_shared_layers": sum(layer >= config.first_shared_layer for layer in kept),
    }
    return {**data, "text_config": {**text, **fields}} if isinstance(text, dict) else {**data, **fields}


def cut(config: Gemma3nConfig, chosen: Slice, name: str) -> Cut | None:
    """See `Slicing`."""
    kept, width = kept_layers(config, chosen), config.hidden_size_per_layer_input
    if name == PLE_NAME:
        return Cut(name, columns=spans_of(kept, width))
    if name in BY_LAYER:
        return Cut(name, rows=spans_of(kept, width))
    first, _, rest = name.partition(".")
    if first != "layers":
        return Cut(name)
    number, _, part = rest.partition(".")
    if int(number) not in kept:
        return None
    at = kept.index(int(number))
    taken = (range(chosen.widths[at]),)
    name = f"layers.{at}.{part}"
    if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        return Cut(name, rows=taken)
    return Cut(name, columns=taken) if part == "mlp.down_proj.weight" else Cut(name)


def kept_layers(config: Gemma3nConfig, chosen: Slice) -> list[int]:
    """The layers that stay."""
    return [layer for layer in range(config.num_hidden_layers) if layer not in set(chosen.skipped)]


@cache
def _published() -> tuple[list[Slice], Json]:
    """Google's slices, the best first, and the table."""
    table = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    source, found = table["source"], []
    for row in table["slices"]:
        quality = {"mmlu": row["mmlu"], "of": "the pre-trained Gemma 3n", "source": source}
        skipped = parse_layers(row["skip"]) if row["skip"] else ()
        found.append(Slice(parse_widths(row["ffn"]), skipped, row["name"], quality))
    return sorted(found, key=lambda each: (-float((each.quality or {})["mmlu"]), sum(each.widths))), table


def _named(config: Gemma3nConfig, name: str) -> Slice:
    published, table = _published()
    names = [each.name or "" for each in published]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        known = f"choose {', '.join(sorted(names))}, or give widths and layers"
        raise UsageError(f"there is no slice {name!r}.{hint} The names are Google's: {known}")
    chosen = next((each for each in slices(config) if each.name == name), None)
    if chosen is None:
        has = f"{config.num_hidden_layers} layers of {max(config.intermediate_size)}"
        raise UsageError(
            f"slice {name} is one of a model with {table['layers']} layers of {table['width']}, and this one "
            f"has {has}: give widths and layers"
        )
    if not chosen.skipped and chosen.widths == config.intermediate_size:
        raise UsageError(f"slice {name} is the whole model: export it as it is")
    return chosen


def _with_quality(config: Gemma3nConfig, chosen: Slice) -> Slice:
    """A slice that is a published one by its widths and layers is that one."""
    same = [s for s in slices(config) if (s.widths, s.skipped) == (chosen.widths, chosen.skipped)]
    return same[0] if same else chosen


def _check_sharing(config: Gemma3nConfig, chosen: Slice, kept: list[int]) -> None:
    """Refuses to leave out a layer whose keys and values others read, and every layer."""
    readers: dict[int, list[int]] = defaultdict(list)
    for layer in kept:
        readers[config.kv_owner[layer]].append(layer)
    for owner, those in readers.items():
        if owner not in kept:
            who = (
                f"layer {those[0]} reads"
                if len(those) == 1
                else f"{len(those)} layers from {those[0]} on read"
            )
            raise UsageError(f"slice {chosen}: layer {owner} must stay: {who} its keys and values")
    if not any(layer in config.kv_layers for layer in kept):
        raise UsageError(f"slice {chosen}: a layer must stay")
