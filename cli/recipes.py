"""Show the recipes: what each stores of a model's parts, and how near the checkpoint its export usually is.

    gemma-edge recipes                 one line a recipe
    gemma-edge recipes int4            all of one, as a JSON file that `export --recipe FILE` takes

"4/64" is 4 bits with a scale for every 64 weights, "4/row" one for every row.
"""

from __future__ import annotations

import argparse
import json

from gemma_edge.cli.text_table import text_table
from gemma_edge.export.weights.recipe import PARTS, Precision, list_recipes, load_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gemma-edge recipes`."""
    parser.add_argument("recipe", nargs="?", help="show this one: a name or a .json file")
    parser.add_argument("--json", action="store_true", help="print the recipes as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints one recipe, or all of them."""
    if args.recipe:
        print(json.dumps(load_recipe(args.recipe).to_dict(), indent=1))
        return 0
    recipes = {name: load_recipe(name) for name in list_recipes()}
    if args.json:
        print(json.dumps({name: recipe.to_dict() for name, recipe in recipes.items()}))
        return 0
    rows = [("recipe", *map(str, PARTS), "KV cache", "mean KL", "top-1", "")]
    for name, recipe in recipes.items():
        parts = [_shown(recipe.parts[part]) for part in PARTS]
        bounds = (f"<= {recipe.bounds.mean_kl:g}", f">= {recipe.bounds.top1:.0%}")
        alias = "" if name == recipe.name else f"another name of {recipe.name}"
        note = alias or ("LiteRT only" if recipe.channelwise else "")
        rows.append((name, *parts, recipe.kv_cache, *bounds, note))
    print(text_table(rows))
    return 0


def _shown(precision: Precision) -> str:
    if precision.bits == 32:
        return "fp32"
    return f"{precision.bits}/{precision.group or 'row'}"
