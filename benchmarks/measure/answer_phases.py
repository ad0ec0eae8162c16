"""One answer to a prompt with pictures and recordings, as `gemma-edge run -a` gives it, phase by phase.

    python -m gemma_edge.benchmarks.measure.answer_phases BUNDLE -a photo.ppm -a note.wav -p 512 -n 64

prints one JSON line. One process does it all: it reads the files, loads the image encoder, encodes, releases
it, does the same with audio, loads the decoder, prefills at least -p tokens, and decodes -n. Memory is
sampled in each phase. `ceiling` runs it under a limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_edge.benchmarks.machine.memory import PeakMemory, PeakSampler, read_memory
from gemma_edge.benchmarks.measure.latency import prompt_text
from gemma_edge.benchmarks.options import KernelOptions, add_kernel_options, kernel_options
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.prompt.prompt_builder import Prompt

Json = dict[str, Any]
FIRST = "tables and tokenizer"  # the phase before the files are read
INTERVAL = 0.005  # seconds between samples of memory
PHOTO = (3024, 4032)  # height and width: what a phone takes
RATE, CLIP_SECONDS = 16_000, 30
MOST = 16  # images and clips: as many stay encoded
ROOM = 8  # tokens that a text may fall short of what it was made for


@dataclasses.dataclass
class _Phases:
    """What each phase took, in order, and the peak of them all."""

    done: list[Json] = dataclasses.field(default_factory=list)
    peak: PeakMemory = dataclasses.field(default_factory=PeakMemory)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with PeakSampler(interval=INTERVAL) as sampler:
            yield
        seconds = time.perf_counter() - start
        peak = sampler.peak.to_dict()
        self.done.append({"name": name, "seconds": round(seconds, 4), "peak": peak})
        for key, value in peak.items():
            setattr(self.peak, key, max(value, getattr(self.peak, key)))


def measure(path: Path, files: Sequence[Path], options: KernelOptions) -> Json:
    """Loads a bundle here and answers one prompt with these files attached; `reps` plays no part.

    Returns:
        A report as of `kernel.measure`, one repetition a test, where prefill is of the tokens that the prompt
        came to, attachments included; with "phases" ("name", "seconds", "peak" of PeakMemory) and
        "soft_tokens".

    Raises:
        MediaError: a file cannot be used.
        BundleError: the bundle has no encoder for one, or is damaged.
        UsageError: the prompt and the answer do not fit the context.
    """
    options.check()
    from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
    from gemma_edge.runtime.model import Model

    run = _Phases()
    with run.phase(FIRST):
        model = Model.load(path, threads=options.threads, context=options.context, defer_decoder=True)
    with run.phase("read"):
        prompt = _prompt(model, files, options)
        attachments = [item.attachment for item in prompt.placed]
    # `Model.stream_tokens` does the next three by itself; one by one, they have phases of their own.
    for kind in ("image", "audio"):
        if found := [item for item in attachments if item.kind == kind]:
            with run.phase(f"{kind} encode"):
                model.encode(found)
    assert isinstance(model.decoder, DeferredDecoder)
    with run.phase("decoder load"):
        model.decoder.load()
    load_s = run.done[-1]["seconds"]
    tokens = iter(model.stream_tokens(prompt, max_tokens=options.n_gen + 1))
    with run.phase("prefill"):
        next(tokens)
    with run.phase("decode"):
        decoded = sum(1 for _ in tokens)
    if decoded != options.n_gen:
        raise DeviceError(f"{decoded} tokens came of the {options.n_gen} that were to be decoded")
    prefill, decode = (int(1e9 * phase["seconds"]) for phase in run.done[-2:])
    return {
        "options": dataclasses.asdict(options),
        "import_s": None,
        "load_s": load_s,
        "soft_tokens": prompt.soft_tokens,
        "tests": [
            Measurement(len(prompt.ids), 0, (prefill,)).to_dict(),
            Measurement(0, decoded, (decode,), len(prompt.ids)).to_dict(),
        ],
        "phases": run.done,
        "memory": {"steady": read_memory().to_dict(), "peak": run.peak.to_dict()},
    }


def _prompt(model: Model, files: Sequence[Path], options: KernelOptions) -> Prompt:
    """Files and a text, at least `n_prompt` tokens together."""
    # Read once: what is an attachment already is taken as it is.
    parts = [part for file in files for part in model.reader.file(file) if not isinstance(part, str)]
    prompt = model.prompt("a", attach=parts)
    if (missing := options.n_prompt - len(prompt.ids)) > 0:
        text = prompt_text(model, len(model.prompt_ids("a")) + missing + ROOM)
        prompt = model.prompt(text, attach=parts)
    if len(prompt.ids) + options.n_gen > options.context:
        size = f"{len(prompt.ids)} tokens of the prompt and {options.n_gen} of the answer"
        raise UsageError(f"{size} do not fit a context of {options.context}: raise --context")
    return prompt


def write_media(folder: Path, images: int, clips: int) -> list[Path]:
    """Noise as files: photos of 12 megapixels (PPM), recordings of 30 s (WAV, 16 kHz, 16 bits); no two alike.

    Raises:
        UsageError: a number that is out of range.
    """
    if min(images, clips) < 0 or not 1 <= images + clips <= MOST:
        raise UsageError(f"--image and --audio: expected numbers from 0, 1 to {MOST} in all")
    rng = np.random.default_rng(0)
    files = []
    for index in range(images):
        files.append(folder / f"photo{index}.ppm")
        pixels = rng.integers(256, size=(*PHOTO, 3), dtype=np.uint8)
        files[-1].write_bytes(b"P6 %d %d 255\n" % PHOTO[::-1] + pixels.tobytes())
    for index in range(clips):
        files.append(folder / f"note{index}.wav")
        samples = 3000 * rng.standard_normal(RATE * CLIP_SECONDS)
        with wave.open(str(files[-1]), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(samples.clip(-32768, 32767).astype("<i2").tobytes())
    return files


def answer_argv(bundle: Path, files: Sequence[Path], options: KernelOptions) -> list[str]:
    """The command line that runs `measure` in a process of its own."""
    argv = [sys.executable, "-m", "gemma_edge.benchmarks.measure.answer_phases", str(bundle)]
    argv += ["-p", str(options.n_prompt), "-n", str(options.n_gen)]
    argv += ["-t", str(options.threads), "--context", str(options.context)]
    return [*argv, *(part for file in files for part in ("-a", str(file)))]


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.benchmarks.measure.answer_phases", description=summary
    )
    add_kernel_options(parser, KernelOptions(reps=1))
    parser.add_argument(
        "-a", "--attach", type=Path, action="append", default=[], metavar="FILE", help="what to attach"
    )
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.bundle, args.attach, kernel_options(args))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
