"""`export_bundle`: a checkpoint becomes an artifact.

The plan comes first and costs nothing; everything that can be refused is refused before the first weight is
read. Then the weights are streamed, one tensor at a time, beside the target; the parity gate compares the
result with the checkpoint; only then is it published.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemma_edge.export.checkpoint.checkpoint import (
    Checkpoint,
    described,
    has_weights,
    public_name,
    resolve,
)
from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.checkpoint.side_files import example_prompt, read_side_files, stated_license
from gemma_edge.export.checkpoint.sliced_checkpoint import sliced_config
from gemma_edge.export.export_families import export_family
from gemma_edge.export.formats.export_format import Artifact, ExportFormat, ExportJob
from gemma_edge.export.formats.registry import DEFAULT_FORMAT, export_format, format_of_target
from gemma_edge.export.gate.gate_prompts import prompt_ids
from gemma_edge.export.gate.parity import Agreement, check_quality, verify_opened
from gemma_edge.export.model.tower import Tower, with_image_size
from gemma_edge.export.plan import Plan, check_ceiling, make_plan
from gemma_edge.export.precision_budget import Choice, PrecisionBudget
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.replaced_bundle import check_replacement
from gemma_edge.export.weights.calibrated_weights import (
    CALIBRATED_BITS,
    calibrate_weights,
    calibration_bytes,
)
from gemma_edge.export.weights.calibration_text import AUTO, CalibrationText, read_calibration
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, KV_CACHES, Bounds, KvCache, Recipe, load_recipe
from gemma_edge.export.weights.rounding import NearestRounding, Rounding
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.bundle_list import peek_manifest
from gemma_edge.runtime.artifacts.manifest import SCHEMA_VERSION
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import ParityError, UsageError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.version import __version__

DEFAULT_CONTEXT = 4096
DEFAULT_CHUNK = 128
# An int8 cache widens stricter bounds of a recipe to these.
INT8_CACHE_BOUNDS = Bounds(mean_kl=1e-3, top1=0.95)
# The gate's prompts are cut to this, so that its logits (a megabyte a token) stay small.
GATE_TOKENS = 48
# What people call a modality, and the bundle's name for its encoder.
MODALITIES: dict[str, Kind] = {"image": "vision", "audio": "audio"}


@dataclass(frozen=True)
class Exported:
    """What an export made: the bundle's folder or file, its plan, how well it agrees (None if not verified),
    a prompt that the checkpoint names as one that it answers well (None if it names none), and what each unit
    got of a budget.
    """

    path: Path
    plan: Plan
    agreement: Agreement | None
    example: str | None = None
    choices: tuple[Choice, ...] = ()


def export_bundle(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    context: int | None = None,
    chunk: int = DEFAULT_CHUNK,
    kv_cache: str | None = None,
    ceiling: int | None = None,
    verify: bool = True,
    progress: bool = False,
    format: str | None = None,
    modalities: Collection[str] | None = None,
    force: bool = False,
    snapshots: int = 0,
    adapters: Sequence[str] = (),
    max_kl: float | None = None,
    slice: str | None = None,
    calibrate: str | None = None,
    image_size: int | None = None,
    budget: int | None = None,
) -> Exported:
    """Exports a checkpoint to a bundle.

    Args:
        source: a checkpoint folder, or a Hugging Face id.
        out: folder of the bundle, or for "litertlm" the file. A bundle of the same checkpoint and recipe that
            is there is replaced; files beside it that are no part of it stay.
        recipe: name of a recipe, path of one, or a `Recipe`.
        context: tokens of KV cache that the plan is made for; None for 4096, or the model's maximum if that
            is smaller.
        chunk: tokens of one prefill call; bounds the memory of activations.
        kv_cache: "fp32" or "int8"; None for what the recipe says; "tflite" takes fp32 then.
        ceiling: bytes of memory that the plan must fit in.
        verify: compare the bundle with the checkpoint before it is published.
        progress: show progress bars on stderr (when it is a terminal).
        format: "onnx" for ONNX Runtime, "tflite" for LiteRT, "litertlm" for LiteRT-LM: see `FORMAT_NAMES`;
            None for the one whose suffix `out` has, else "onnx".
        modalities: "text", and "image" and "audio" for their encoders; None for all that the checkpoint has.
        force: replace a bundle of another checkpoint or recipe, too.
        snapshots: bytes that the plan counts for KV snapshots of other conversations, see `Model.load`.
        adapters: folders or ids of LoRA adapters to merge, each perhaps with a weight, as "lora/=0.5".
        slice: export this slice of the model: a published one's name, such as "E2.54B", or widths and layers,
            such as "ffn=8192/skip=20-24"; None for the whole model. Adapters are merged before the cut.
        max_kl: refuse a bundle whose mean KL from the checkpoint is larger, in nats a token; None for any.
        calibrate: the text on which the rounding of 4-bit weights is calibrated: "auto" for a built-in one,
            or the path of a file; "none" rounds to the nearest. None: "auto" if the recipe has such weights.
        image_size: pixels of a side that images are scaled to, one of `VisionConfig.image_sizes`; None for
            the checkpoint's own. An image is as many tokens at each.
        budget: bytes of weights that decoding a token may read at most: each layer's attention, feed-forward
            and small projections and the head get 4 or 8 bits by what their rounding is measured to cost;
            the other parts are those of `recipe`. None for the recipe alone.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the checkpoint is bad; the message names the file.
        UsageError: an unknown recipe or slice, a target that is not a bundle or must not be replaced, or an
            encoder that the checkpoint lacks, or a calibration text that is none.
        CeilingError: the plan does not fit, or no weights fit the budget; the message says what would.
        ParityError: the result is not what the recipe makes of the checkpoint, or is beyond `max_kl`; nothing
            is published.
    """
    chosen = export_format(format_of_target(out, format))
    recipe = resolve_recipe(recipe, kv_cache, chosen.runtime.name)
    text = read_calibration(calibrate or AUTO)
    with open_checkpoint(source, modalities, adapters, slice, image_size) as checkpoint:
        job = export_job(checkpoint.config, recipe, context, chunk, checkpoint.towers, snapshots)
        files, choices = read_side_files(checkpoint), list[Choice]()
        if budget is not None:
            spending = PrecisionBudget(job, chosen, budget)
            check_replacement(Path(out), _source(checkpoint, source), spending.name, force=force)
            recipe, choices = _spent(spending, text, checkpoint, files.tokenizer, progress)
            job = replace(job, recipe=recipe)
        plan = make_plan(job, chosen)
        if calibrate is None and not calibration_bytes(chosen.decoder_layout(job).tensors):
            text = None
        if ceiling is not None:
            check_ceiling(plan, ceiling, job, chosen)
        facts = _facts(checkpoint, recipe, plan, str(source))
        check_replacement(Path(out), facts["source"], recipe.name, force=force)
        prompts = prompt_ids(files.tokenizer, min(GATE_TOKENS, job.context))
        calibration = _Calibration(text, files.tokenizer, job, chosen) if text else None
        if calibration:
            facts["calibration"] = calibration.record
        artifact = chosen.prepare(job, files, facts, Path(out))
        with artifact.writer as writer:
            room = chosen.room_bytes(plan.file_bytes)
            writer.check_room(room + (calibration.bytes if calibration else 0))
            rounding: Rounding = NearestRounding(recipe.clip)
            if calibration:
                rounding = calibration.run(checkpoint, writer.scratch, progress)
            artifact.write(checkpoint, prompts, rounding, progress)
            agreement = None
            if verify:
                agreement = _verify(artifact, checkpoint, prompts, (recipe.bounds, max_kl), progress)
                artifact.record_agreement(agreement.to_dict())
            return Exported(artifact.publish(), plan, agreement, facts.get("example"), tuple(choices))


def _spent(
    spending: PrecisionBudget,
    text: CalibrationText | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    progress: bool,
) -> tuple[Recipe, list[Choice]]:
    """The recipe that a budget makes, measured on a text: ours if None; and what each unit got."""
    measured = text or read_calibration(AUTO)
    assert measured is not None
    sequences = measured.sequences(tokenizer, checkpoint.config)
    with ProgressBar("measuring what bits cost", spending.elements, progress, unit="weights") as bar:
        return spending.choose(checkpoint, sequences, bar.advance)


class _Calibration:
    """A calibration to be run; what can be refused is refused here."""

    def __init__(
        self, text: CalibrationText, tokenizer: Tokenizer, job: ExportJob, format: ExportFormat
    ) -> None:
        self.tensors, self.recipe, self.text = format.decoder_layout(job).tensors, job.recipe, text.name
        self.bytes = calibration_bytes(self.tensors)
        if not self.bytes:
            raise UsageError(
                f"recipe {job.recipe.name} has no weights of {CALIBRATED_BITS} bits to calibrate: "
                "leave out --calibrate"
            )
        self.sequences = text.sequences(tokenizer, job.config)
        self.record = text.record(self.sequences)

    def run(self, checkpoint: Checkpoint, folder: Path, progress: bool) -> Rounding:
        """Rounds the weights, which lie in `folder` until they are written."""
        total, began = sum(tensor.elements for tensor in self.tensors), time.perf_counter()
        if progress:
            text = "the built-in text" if self.text == AUTO else self.text
            tell(f"calibrating 4-bit weights on {text}; --calibrate none rounds them to the nearest instead")
        with ProgressBar("calibrating", total, progress, unit="weights") as bar:
            rounding = calibrate_weights(
                checkpoint, self.tensors, self.sequences, self.recipe.clip, folder, bar.advance
            )
        if progress:
            tell(f"calibrated in {time.perf_counter() - began:.0f} s")
        return rounding


def _verify(
    artifact: Artifact,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    limits: tuple[Bounds, float | None],
    progress: bool,
) -> Agreement:
    """The gate."""
    bundle = Bundle.open(artifact.path)
    scratch = artifact.writer.scratch
    try:
        agreement = verify_opened(bundle, checkpoint, prompts, scratch=scratch, progress=progress)
        check_quality(agreement, *limits)
    except ParityError as error:
        raise ParityError(f"{error}. Nothing was published; --no-verify publishes as it is") from None
    return agreement


def open_checkpoint(
    source: str | Path,
    modalities: Collection[str] | None,
    adapters: Sequence[str] = (),
    slice: str | None = None,
    image_size: int | None = None,
) -> Checkpoint:
    """The checkpoint with the encoders of `modalities`, its changes and its image size, see `export_bundle`.

    Raises:
        CheckpointError: the checkpoint is bad, or an adapter cannot be merged into it.
        UsageError: one of them is unknown, or the checkpoint does not have it.
    """
    wanted = _kinds(modalities)
    checkpoint = open_source(source, adapters, wanted, slice)
    for name, kind in MODALITIES.items():
        if modalities is not None and kind in wanted and kind not in checkpoint.towers:
            checkpoint.close()
            raise UsageError(
                f"{source}: the checkpoint has no {name} encoder: leave {name} out of the modalities"
            )
    try:
        checkpoint.towers = with_image_size(checkpoint.towers, image_size)
    except UsageError:
        checkpoint.close()
        raise
    return checkpoint


def _kinds(modalities: Collection[str] | None) -> list[Kind]:
    names = ("text", *MODALITIES) if modalities is None else modalities
    for name in names:
        if name not in ("text", *MODALITIES):
            raise UsageError(f"unknown modality {name!r}: choose from text, {', '.join(MODALITIES)}")
    if "text" not in names:
        raise UsageError("text is always exported: add it to the modalities")
    return [kind for name, kind in MODALITIES.items() if name in names]


def describe_source(
    source: str,
    modalities: Collection[str] | None,
    adapters: Sequence[str] = (),
    slice: str | None = None,
    image_size: int | None = None,
) -> tuple[TextConfig, Mapping[Kind, Tower]]:
    """What a plan needs. Where there are no weights yet, config.json is taken at its word."""
    folder = resolve(source)
    if has_weights(folder):
        with open_checkpoint(source, modalities, adapters, slice, image_size) as checkpoint:
            return checkpoint.config, checkpoint.towers
    config, towers = described(folder, _kinds(modalities))
    if slice is not None:
        family = export_family(folder)
        config = sliced_config(family, folder, config, slice)[2]
    return config, with_image_size(towers, image_size)


def export_job(
    config: TextConfig,
    recipe: Recipe,
    context: int | None,
    chunk: int,
    towers: Mapping[Kind, Tower] = MappingProxyType({}),
    snapshots: int = 0,
) -> ExportJob:
    """The job, its context (see `export_bundle`) and chunk checked.

    Raises:
        UsageError: a context or chunk that the model cannot have.
    """
    if context is None:
        context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    if not 1 <= context <= config.max_position_embeddings:
        raise UsageError(
            f"--context must be 1 to {config.max_position_embeddings} for this model, not {context}"
        )
    if chunk < 1:
        raise UsageError(f"--chunk must be 1 or more, not {chunk}")
    return ExportJob(config, recipe, context, min(chunk, context), towers, snapshots)


def plan_export(
    config: TextConfig,
    recipe: Recipe,
    context: int | None,
    chunk: int,
    format: str = DEFAULT_FORMAT,
    towers: Mapping[Kind, Tower] = MappingProxyType({}),
) -> Plan:
    """The plan alone: no weight is read.

    Raises:
        UsageError: a context or chunk that the model cannot have, or a precision that the format cannot hold.
    """
    return make_plan(export_job(config, recipe, context, chunk, towers), export_format(format))


def resolve_recipe(recipe: str | Path | Recipe, kv_cache: str | None, format: str) -> Recipe:
    """The recipe with the precision of the KV cache that is asked for, or else the format's own choice.

    Raises:
        UsageError: an unknown recipe, or another precision than fp32 and int8.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if kv_cache not in (None, *KV_CACHES):
        raise UsageError(f"kv_cache must be {' or '.join(KV_CACHES)}, not {kv_cache!r}")
    default: KvCache = recipe.kv_cache if export_format(format).int8_by_default else "fp32"
    chosen = next((c for c in KV_CACHES if c == kv_cache), default)
    if chosen == "int8" != recipe.kv_cache:
        own = recipe.bounds
        mean_kl, top1 = max(own.mean_kl, INT8_CACHE_BOUNDS.mean_kl), min(own.top1, INT8_CACHE_BOUNDS.top1)
        return replace(recipe, kv_cache=chosen, bounds=replace(own, mean_kl=mean_kl, top1=top1, max_abs=None))
    return replace(recipe, kv_cache=chosen)


def replaced_by(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    force: bool = False,
    adapters: Sequence[str] = (),
    slice: str | None = None,
) -> str:
    """What an export to `out` replaces, for people, before anything is read; "" for nothing.

    Raises:
        UsageError: `export_bundle` would refuse to replace it.
    """
    if peek_manifest(Path(out)) is None:
        return ""
    with open_checkpoint(source, ["text"], adapters, slice) as checkpoint:
        return check_replacement(Path(out), _source(checkpoint, source), recipe.name, force=force)


def _source(checkpoint: Checkpoint, source: str | Path) -> dict[str, str]:
    """The manifest's "source": no path, which may tell whose machine it was, but a hash of it, which tells
    whether another export is of the same folder.
    """
    made = {"name": public_name(str(source)), "revision": checkpoint.revision()}
    if (folder := Path(source).expanduser()).is_dir():
        made["folder"] = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return made


def _facts(checkpoint: Checkpoint, recipe: Recipe, plan: Plan, source: str) -> dict[str, Any]:
    """What every format's manifest says."""
    return {
        "schema_version": SCHEMA_VERSION,
        "format": plan.format,
        "generator": f"gemma-edge {__version__}",
        "source": _source(checkpoint, source),
        "recipe": recipe.to_dict(),
        "context": plan.context,
        "chunk": plan.chunk,
        "kv_cache": recipe.kv_cache,
        "plan": plan.to_dict(),
        **checkpoint.changes(),
        **({"example": example} if (example := example_prompt(checkpoint.path)) else {}),
        **({"license": license} if (license := stated_license(checkpoint.path)) else {}),
        **({} if Path(source).expanduser().is_dir() else {"base_model": source}),
    }
