"""The parity gate of encoders: a bundle's rows against the reference's, of a test picture and sound.

The graph that was written is run whole, at the size that it has, in a process of its own; so is the
reference, in fp32, over the checkpoint's own weights: on a picture of `image_size` pixels, and on 2 s of
sound, which go through every layer and past the end of what the encoder attends to. What is not compared is
a long clip.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.reference_audio import evaluate_audio
from gemma_edge.export.emit.reference.reference_vision import evaluate_vision
from gemma_edge.export.gate.engine_process import run_isolated
from gemma_edge.export.model.tower import Inputs, Json, Tower
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.families.model_family import LogMelConfig, PixelsConfig
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.media.encoder_pool import load_encoder

Array = NDArray[np.float32]
CLIP_SECONDS = 2.0


def encoder_errors(
    bundle: Bundle, checkpoint: Checkpoint, *, scratch: Path | None = None, progress: bool = False
) -> dict[str, float]:
    """How far each encoder of the bundle is from the checkpoint's.

    Args:
        scratch: a folder for the encoders' inputs and outputs; by default the temporary one.

    Returns:
        By "vision" and "audio": the root of the mean square of the difference, over that of the reference.

    Raises:
        BundleError: an encoder does not load.
    """
    errors = {}
    for kind, encoder in checkpoint.towers.items():
        if kind not in bundle.modalities:
            continue
        sample = sample_input(encoder)
        with temporary_folder(parent=scratch) as folder:
            given, out = folder / "input.npy", folder / "rows.npy"
            np.save(given, sample)
            with ProgressBar(f"running the {kind} encoder", 0, progress):
                run_isolated(bundle.path, write_soft_tokens, kind, given, out)
            theirs = np.load(out)
        total = sum(spec.size for spec in encoder.specs.values())
        with ProgressBar(f"running the {kind} reference", total, progress, "weights") as bar:
            evaluate = EVALUATORS[encoder.model.inputs]
            ours = evaluate(checkpoint, encoder.config, sample, progress=bar.advance)
        errors[str(kind)] = relative_error(theirs, ours)
    return errors


def relative_error(got: Array, expected: Array) -> float:
    """Root mean square of the difference over that of `expected`; a NaN stays one."""
    difference, size = (np.sqrt(np.mean(np.square(x, dtype=np.float64))) for x in (got - expected, expected))
    return float(difference / size)


def sample_input(encoder: Tower) -> Array:
    """The input of both, the same every time: (3, size, size) pixels, or (frames, bins) of log-mel."""
    return SAMPLES[encoder.model.inputs](encoder.config, encoder.preprocessor)


def picture(config: PixelsConfig, _: Json) -> Array:
    """Smooth like a photograph, with some noise: waves of a few lengths and directions in each colour."""
    random, size = np.random.default_rng(0), config.image_size
    grid = np.mgrid[:size, :size] / size
    waves = random.uniform(1, 24, (3, 8, 2))
    phases = random.uniform(0, 2 * np.pi, (3, 8, 1, 1))
    smooth = np.sin(2 * np.pi * np.tensordot(waves, grid, 1) + phases).mean(axis=1)
    noisy = 0.5 + 0.5 * smooth + 0.02 * random.standard_normal(smooth.shape)
    return np.clip(noisy, 0, 1).astype(np.float32)


def voice(config: LogMelConfig, preprocessor: Json) -> Array:
    """A voice of sorts: harmonics of a pitch that glides, swelling and fading, and some noise."""
    random, extractor = np.random.default_rng(0), LogMel.from_dict(preprocessor)
    time = np.arange(round(CLIP_SECONDS * extractor.sampling_rate)) / extractor.sampling_rate
    pitch = np.cumsum(120 + 60 * np.sin(2 * np.pi * 0.7 * time)) / extractor.sampling_rate
    harmonics = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 20))
    noise = 0.002 * random.standard_normal(len(time))
    sound = 0.1 * harmonics * np.sin(2 * np.pi * 2.5 * time) ** 2 + noise
    return extractor(sound.astype(np.float32))[0][: config.max_frames]


EVALUATORS: dict[Inputs, Callable[..., Array]] = {"pixels": evaluate_vision, "log_mel": evaluate_audio}
SAMPLES: dict[Inputs, Callable[[Any, Json], Array]] = {"pixels": picture, "log_mel": voice}


def write_soft_tokens(path: Path, kind: str, given: Path, out: Path) -> None:
    """Runs an encoder of the bundle at `path` on the array in a file, and writes what it gives to another."""
    bundle = Bundle.open(path)
    with load_encoder(bundle, bundle.modalities[kind]) as encoder:
        np.save(out, encoder.encode(np.load(given)))
