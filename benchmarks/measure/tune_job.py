"""`tune_bundles` and `keep_choice`: bundles measured on a machine, and the quickest settings kept for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.measure.target import Target
from gemma_edge.benchmarks.measure.tuning import Candidate, Tuned, first_candidates, tune
from gemma_edge.benchmarks.measure.tuning_place import Place
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.environment import now
from gemma_edge.benchmarks.records.measurement import TurnSizes
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.weights.calibration_text import NONE
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.tuned_settings import TunedSettings

PROCESS_TIMEOUT = 900.0
Labelled = tuple[Path, str]


def export_candidates(
    source: str, folder: Path, formats: Sequence[str], recipes: Sequence[str]
) -> Iterator[Labelled]:
    """Exports a checkpoint in each recipe and format, neither calibrated nor checked: only speed matters.

    Raises:
        UsageError, CheckpointError: it cannot be exported so.
    """
    for format in formats:
        for recipe in recipes:
            out = folder / f"{format}-{recipe}{ARTIFACT_FORMATS[format].suffix}"
            options: dict[str, Any] = {"verify": False, "calibrate": NONE, "progress": True}
            made = export_bundle(source, out, recipe=recipe, format=format, **options)
            yield made.path, f"{format} {recipe}"


def check_sizes(bundles: Sequence[Labelled], sizes: TurnSizes) -> None:
    """Raises BundleError for a bundle that cannot be opened, UsageError for one that a turn does not fit."""
    for path, label in bundles:
        context = Bundle.open(path).context
        if sizes.n_prompt + sizes.n_gen > context:
            raise UsageError(
                f"{label}: a turn of {sizes.n_prompt} and {sizes.n_gen} tokens does not fit its context of "
                f"{context}: lower -p or -n"
            )


def tune_bundles(place: Place, bundles: Sequence[Labelled], sizes: TurnSizes, rounds: int) -> Tuned:
    """Measures bundles on a machine.

    Args:
        bundles: each with its name in tables.

    Raises:
        BundleError, UsageError: as `check_sizes`, or no engine of a bundle's there.
        DeviceError, ChildError: the first bundle cannot be measured.
    """
    check_sizes(bundles, sizes)
    for path, label in bundles:
        if (format := Bundle.open(path).format) not in place.formats:
            where = place.address or "this machine"
            runs = ", ".join(place.formats) or "none"
            raise DeviceError(f"{label}: {where} has no engine for {format}; formats that it runs: {runs}")
    targets: dict[Path, Target] = {}

    def work(candidate: Candidate, workload: Workload) -> RunReport:
        if candidate.path not in targets:
            targets[candidate.path] = place.target(candidate.path)
        report = targets[candidate.path].work(workload, None, PROCESS_TIMEOUT).report
        assert report is not None  # nothing limits it
        return report

    return tune(first_candidates(bundles, place.processor()), sizes, rounds, work)


def subjects_of(bundle: Bundle) -> tuple[str, str | None]:
    """What settings are kept by: the bundle's identity, and the revision of its checkpoint."""
    source: Any = bundle.manifest.get("source")
    revision = source.get("revision") if isinstance(source, dict) else None
    return bundle.identity, revision if isinstance(revision, str) else None


def keep_choice(place: Place, tuned: Tuned, machine: str) -> list[Path]:
    """Keeps the settings of each bundle that was measured and, if all came from one checkpoint and there were
    several, which of them to export. Returns the files.

    Raises:
        OSError, DeviceError: they cannot be kept.
    """
    time, files, revisions = now(), [], set()
    for pick in tuned.picks:
        chosen = pick.candidate
        identity, revision = subjects_of(chosen.bundle)
        revisions.add(revision)
        settings = TunedSettings(chosen.threads, chosen.chunk, round(pick.gain, 3), machine, time)
        files.append(place.keep(identity, settings))
        if chosen.path == tuned.best.path:
            recipe: Any = chosen.bundle.manifest.get("recipe")
            name = recipe.get("name") if isinstance(recipe, dict) else recipe
            best = replace(settings, gain=round(tuned.gain, 3), format=chosen.bundle.format, recipe=str(name))
    revision = revisions.pop() if len(revisions) == 1 else None
    if revision and len(tuned.picks) > 1:
        files.append(place.keep(revision, best))
    return files


def forget_choice(place: Place, bundles: Sequence[Path]) -> int:
    """Forgets what is kept of bundles, and of their checkpoints. Returns how many settings there were."""
    found = 0
    for path in bundles:
        found += sum(place.forget(subject) for subject in subjects_of(Bundle.open(path)) if subject)
    return found
