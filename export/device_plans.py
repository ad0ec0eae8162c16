"""`rank_plans`: the slice, recipe, format, context and KV cache of a checkpoint that suit a machine.

Nothing here is a measurement of its own: memory is the plan's, quality is what others have published of a
slice and what the gate has measured of a bundle, and speed is bandwidth over the bytes of a step, which no
engine exceeds, or a measured row.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma_edge.export.checkpoint.checkpoint import has_weights, resolve, revision_of
from gemma_edge.export.checkpoint.sliced_checkpoint import slice_revision, sliced_config
from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.exporter import (
    DEFAULT_CHUNK,
    DEFAULT_CONTEXT,
    describe_source,
    export_job,
    resolve_recipe,
)
from gemma_edge.export.formats.export_format import ExportFormat
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.gate.parity import USABLE
from gemma_edge.export.model.model_slice import Slice
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.plan import WORKING_FILE_BYTES, Plan, base_bytes, make_plan
from gemma_edge.export.weights.calibrated_weights import can_calibrate
from gemma_edge.export.weights.calibration_text import AUTO, NONE, OURS
from gemma_edge.export.weights.recipe import KV_CACHES, Recipe, list_recipes, load_recipe
from gemma_edge.runtime.artifacts.bundle_list import find_bundles, peek_manifest
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.json_shape import misfit
from gemma_edge.runtime.units import format_size

MEASURED_SHAPE = {
    "source": {"revision": "text"},
    "kv_cache": "text",
    "agreement": {"mean_kl": "number"},
    "calibration?": {"sha256": "text"},
}
SHORTER = (2048, 1024, 512)  # contexts, where a longer one does not fit
MIN_SPEED = 5.0  # tokens a second: about as fast as people read


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Attributes:
        name: for people, with where its numbers come from.
        memory: bytes that a model may take.
        formats: those that run there, the recommended one first.
        bandwidth_gb_s: 10^9 bytes a second that memory gives; None where nobody has measured it.
        speeds: measured tokens a second of decoding, by format, recipe and bytes a token.
    """

    name: str
    memory: int
    formats: tuple[str, ...]
    bandwidth_gb_s: float | None = None
    speeds: Mapping[tuple[str, str, int], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wishes:
    """What a plan must have.

    Attributes:
        context: tokens of KV cache; None for as many as an export has, or fewer where they do not fit.
        modalities: as of `export_bundle`.
        ceiling: bytes of anonymous memory at most; None for what the machine has.
        min_quality: the published MMLU of a slice at least, in percent; None takes those without one, too.
        min_speed: tokens a second at least, where a speed is known.
        image_size: as of `export_bundle`.
    """

    context: int | None = None
    modalities: Collection[str] | None = None
    ceiling: int | None = None
    min_quality: float | None = None
    min_speed: float = MIN_SPEED
    image_size: int | None = None


@dataclass(frozen=True)
class DevicePlan:
    """One way to export a checkpoint for a machine.

    Attributes:
        slice: None for the whole model.
        mmlu: published of the slice of the unquantized pre-trained model, in percent; None if nothing is.
        mean_kl: of a bundle of this checkpoint, slice, recipe and rounding, as the gate measured it; or None.
        speed: tokens a second with a full context; None where no bandwidth is known.
        measured: whether `speed` was measured; else no engine exceeds it.
        calibrate: as in `export_bundle`. "none" is planned only where a bundle has shown what it costs.
    """

    slice: Slice | None
    recipe: Recipe
    plan: Plan
    mapped_bytes: int
    mmlu: float | None
    mean_kl: float | None
    speed: float | None
    measured: bool
    calibrate: str | None = None

    @property
    def memory_bytes(self) -> int:
        """The larger phase; the one that answers also reads mapped weights at each step."""
        answer = self.plan.answer_bytes + WORKING_FILE_BYTES + self.mapped_bytes
        return max(self.plan.needed_bytes, answer)

    def options(self) -> list[str]:
        """The options of `gemma-edge export` that make it."""
        found = ["--slice", str(self.slice)] if self.slice else []
        found += ["--format", self.plan.format, "--recipe", self.recipe.name]
        found += ["--context", str(self.plan.context), "--kv-cache", self.recipe.kv_cache]
        return [*found, *(["--calibrate", self.calibrate] if self.calibrate else [])]


@dataclass(frozen=True)
class _Size:
    """The whole model or a slice of it, its config, and the MMLU that is published of it, in percent."""

    slice: Slice | None
    config: TextConfig
    mmlu: float | None


def rank_plans(
    source: str, machine: Machine, wishes: Wishes, bundles: Sequence[Path] = ()
) -> list[DevicePlan]:
    """The plans that fit, the best first: one for each format, recipe and KV cache, and an uncalibrated one
    where its KL is known.

    Plans of the wanted context come first; of these, those with a usable recipe that reach the wanted speed;
    of these, the slice with the best published MMLU, then the recipe that is nearest the checkpoint, then the
    fastest. Plans below the wanted speed are in the order of their speed.

    Args:
        bundles: folders that may hold bundles of this checkpoint, whose measured KL counts.

    Raises:
        UsageError: a context or modality that the model does not have, no slice of the wanted quality, or no
            such folder of bundles.
        CeilingError: nothing fits; the message says what comes nearest.
    """
    config, towers = describe_source(source, wishes.modalities, image_size=wishes.image_size)
    sizes = _sizes(source, config, wishes.min_quality)
    search = _Search(towers, machine, wishes, _measured_kl(source, sizes, bundles))
    recipes = {recipe.name: recipe for recipe in map(load_recipe, list_recipes())}  # without other names
    found = []
    for format in map(export_format, machine.formats):
        for recipe in recipes.values():
            if format.unsupported(config, recipe) is None:
                for cache in KV_CACHES:
                    found += search.best(format, resolve_recipe(recipe, cache, format.runtime.name), sizes)
    if not found:
        raise CeilingError(search.nothing_fits())
    return sorted([*found, *filter(None, map(search.uncalibrated, found))], key=search.order)


def _sizes(source: str, config: TextConfig, least: float | None) -> list[_Size]:
    """The whole model and its published slices, the best first, without those that a smaller one equals."""
    folder, family = resolve(source), family_with(config)
    found: list[_Size] = []
    smallest = 0
    for each in family.slicing.slices(config):
        if found and sum(each.widths) >= smallest:
            continue
        smallest = sum(each.widths)
        mmlu = float((each.quality or {})["mmlu"])
        if not each.skipped and each.widths == config.intermediate_size:
            found.append(_Size(None, config, mmlu))
        else:
            found.append(_Size(each, sliced_config(family, folder, config, str(each))[2], mmlu))
    found = found or [_Size(None, config, None)]
    if least is None:
        return found
    best = found[0].mmlu
    if best is None:
        raise UsageError("--min-quality: no MMLU of this model is published")
    if best < least:
        raise UsageError(f"--min-quality {least:g}: the best that is published is {best:g} %")
    return [size for size in found if size.mmlu is not None and size.mmlu >= least]


@dataclass
class _Search:
    """Makes plans for one machine. `least` is what the smallest needs at least, in bytes."""

    towers: Mapping[Kind, Tower]
    machine: Machine
    wishes: Wishes
    measured: Mapping[tuple[str, ...], float]
    least: int = sys.maxsize

    def best(self, format: ExportFormat, recipe: Recipe, sizes: Sequence[_Size]) -> list[DevicePlan]:
        """The first size that fits and is fast enough, or of those that fit the fastest."""
        slow: list[DevicePlan] = []
        for size in sizes:
            if (plan := self._fitting(format, recipe, size, last=size is sizes[-1])) is None:
                continue
            if not self._too_slow(plan.speed):
                return [plan]
            slow = [plan]  # a later size is smaller, and so faster
        return slow

    def _fitting(self, format: ExportFormat, recipe: Recipe, size: _Size, *, last: bool) -> DevicePlan | None:
        """The plan of the longest context that fits, up to the wanted one; a slow one of the last size only.

        What a plan holds at least says of most that none is to be made: each takes a tenth of a second.
        """
        weights = weight_floor(size.config, recipe)
        for context in self._contexts(size.config):
            job = export_job(size.config, recipe, context, DEFAULT_CHUNK, self.towers)
            cache = format.kv_cache_bytes(job)
            rest = cache + base_bytes(job.config, format) + WORKING_FILE_BYTES
            rest += family_with(job.config).text.activation_bytes(job.config, job.chunk)
            self.least = min(self.least, rest + weights)
            if not last and not self.machine.speeds and self._too_slow(self._speed(weights + cache)):
                return None
            if self._fits(rest if format.mapped else rest + weights, rest + weights):
                plan = self._described(make_plan(job, format), format, recipe, size)
                if self._fits(plan.plan.needed_bytes, plan.memory_bytes):
                    return plan
        return None

    def _fits(self, anonymous: int, memory: int) -> bool:
        ceiling = self.machine.memory if self.wishes.ceiling is None else self.wishes.ceiling
        return anonymous <= ceiling and memory <= self.machine.memory

    def _contexts(self, config: TextConfig) -> list[int]:
        if self.wishes.context is not None:
            return [self.wishes.context]
        wanted = min(DEFAULT_CONTEXT, config.max_position_embeddings)
        return [wanted, *(n for n in SHORTER if n < wanted)]

    def _described(self, plan: Plan, format: ExportFormat, recipe: Recipe, size: _Size) -> DevicePlan:
        key = (plan.format, recipe.name, plan.bytes_per_token)
        measured = self.machine.speeds.get(key)
        speed = self._speed(plan.bytes_per_token + plan.kv_cache_bytes) if measured is None else measured
        mapped = plan.bytes_per_token if format.mapped else 0
        found = DevicePlan(size.slice, recipe, plan, mapped, size.mmlu, None, speed, measured is not None)
        return replace(found, mean_kl=self._kl(found, AUTO if can_calibrate(recipe) else NONE))

    def uncalibrated(self, plan: DevicePlan) -> DevicePlan | None:
        """The plan with weights rounded to the nearest; None where no bundle has shown what that costs."""
        kl = self._kl(plan, NONE) if can_calibrate(plan.recipe) else None
        return None if kl is None else replace(plan, mean_kl=kl, calibrate=NONE)

    def _kl(self, plan: DevicePlan, calibrate: str) -> float | None:
        recipe = plan.recipe
        return self.measured.get(
            (str(plan.slice or ""), plan.plan.format, recipe.name, recipe.kv_cache, calibrate)
        )

    def _speed(self, step_bytes: int) -> float | None:
        gb_s = self.machine.bandwidth_gb_s
        return None if gb_s is None else gb_s * 1e9 / step_bytes

    def _too_slow(self, speed: float | None) -> bool:
        return speed is not None and speed < self.wishes.min_speed

    def order(self, plan: DevicePlan) -> tuple[float, ...]:
        """What plans are sorted by: the least first.

        Weights rounded to the nearest do not come before calibrated ones for want of a measurement of these.
        """
        fair = plan.calibrate is None or self._kl(plan, AUTO) is not None
        kl = plan.mean_kl if plan.mean_kl is not None and fair else plan.recipe.bounds.mean_kl
        quality = (-(plan.mmlu or 0.0), kl, plan.calibrate is not None, plan.recipe.kv_cache != "fp32")
        speed = -plan.speed if plan.speed is not None else float(plan.plan.bytes_per_token)
        slow = self._too_slow(plan.speed)
        rest = (speed, *quality) if slow else (*quality, speed)
        return (-plan.plan.context, slow, kl > USABLE, *rest, self.machine.formats.index(plan.plan.format))

    def nothing_fits(self) -> str:
        """Why no plan is left."""
        ceiling = self.wishes.ceiling
        limit = "" if ceiling is None else f" with a ceiling of {format_size(ceiling)}"
        room = f"the {format_size(self.machine.memory)} that a model may take of {self.machine.name}"
        return f"nothing fits into {room}{limit}: the smallest plan needs more than {format_size(self.least)}"


def weight_floor(config: TextConfig, recipe: Recipe) -> int:
    """Bytes of weights that a decode step reads at least: integers, and two bytes for each scale."""
    mapped = (PLE_NAME, *([] if config.tie_word_embeddings else [EMBEDDING_NAME]))
    total = 0
    for spec in tensor_specs(config).values():
        if spec.name not in mapped:
            precision = recipe.precision(spec)
            total += spec.size * precision.bits // 8
            if precision.bits < 32:
                total += 2 * spec.shape[0] * precision.blocks(spec.shape[-1])
    return total


def _measured_kl(
    source: str, sizes: Sequence[_Size], folders: Sequence[Path]
) -> dict[tuple[str, ...], float]:
    """The mean KL that gates have measured of a checkpoint's bundles, by slice, format, recipe, KV cache, and
    whether they were calibrated on the built-in text: AUTO or NONE. Those on other texts do not count.
    """
    for folder in folders:
        if not folder.exists():
            raise UsageError(f"{folder}: no such folder of bundles")
    if not folders or not has_weights(resolve(source)):
        return {}
    whole = revision_of(source)
    revisions = {slice_revision(whole, size.slice) if size.slice else whole: size.slice for size in sizes}
    texts = {None: NONE, hashlib.sha256(OURS.read_bytes()).hexdigest(): AUTO}
    found: dict[tuple[str, ...], float] = {}
    for listed in (bundle for folder in folders for bundle in find_bundles(folder)):
        manifest = peek_manifest(listed.path)
        if misfit(manifest, MEASURED_SHAPE) or manifest is None:
            continue
        revision, cache = manifest["source"]["revision"], manifest["kv_cache"]
        text = (manifest.get("calibration") or {}).get("sha256")
        if revision in revisions and text in texts:
            key = (str(revisions[revision] or ""), listed.format, listed.recipe, cache, texts[text])
            found[key] = float(manifest["agreement"]["mean_kl"])
    return found
