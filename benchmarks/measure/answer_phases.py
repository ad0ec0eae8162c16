"""One answer to a prompt with pictures and recordings, as `gemma-edge run -a` gives it, phase by phase.

One process reads the files, loads the image encoder, encodes, releases the encoder, does the same with audio,
loads the decoder, prefills and decodes. Memory is sampled in each phase.
"""

from __future__ import annotations

import dataclasses
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_edge.benchmarks.measure.latency import prompt_text
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import bundle_files
from gemma_edge.benchmarks.records.measurement import KernelTest
from gemma_edge.benchmarks.records.rows import CLIP_SECONDS
from gemma_edge.benchmarks.records.run_report import MemoryReport, Phase, RunReport
from gemma_edge.devices.machine.memory import PeakMemory, PeakSampler, drop_page_cache, read_memory
from gemma_edge.runtime.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.prompt.prompt_builder import Prompt

FIRST = "tables and tokenizer"  # the phase before the files are read
INTERVAL = 0.005  # seconds between samples of memory
PHOTO = (3024, 4032)  # height and width: what a phone takes
RATE = 16_000
MOST = 16  # images and clips: as many stay encoded
ROOM = 8  # tokens that a text may fall short of what it was made for


@dataclasses.dataclass
class _Phases:
    """Each phase, in order, and the peak of them all."""

    done: list[Phase] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: PeakMemory = dataclasses.field(default_factory=PeakMemory)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with PeakSampler(interval=INTERVAL) as sampler:
            yield
        self.seconds.append(time.perf_counter() - start)
        self.done.append(Phase(name, seconds=round(self.seconds[-1], 4), peak=sampler.peak))
        for key in ("rss_anon", "rss_file", "rss", "high_water", "samples"):
            setattr(self.peak, key, max(getattr(sampler.peak, key), getattr(self.peak, key)))


def measure_answer(path: Path, workload: Workload) -> RunReport:
    """Loads a bundle here and answers one prompt with the workload's files attached.

    Returns:
        Two tests of one repetition each, where prefill is of all tokens of the prompt, attachments included;
        "phases" with seconds and peak memory, "soft_tokens", "memory".

    Raises:
        MediaError: a file cannot be used.
        BundleError: the bundle is damaged, or has no encoder for a file.
        UsageError: the prompt and the answer do not fit the context.
    """
    from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
    from gemma_edge.runtime.model import Model

    n_gen = workload.n_gen
    cached = drop_page_cache(bundle_files(path)) if workload.cold else None
    run = _Phases()
    with run.phase(FIRST):
        model = Model.load(
            path, threads=workload.threads, context=workload.context, defer_decoder=True, snapshots=0
        )
    with run.phase("read"):
        prompt = _prompt(model, list(map(Path, workload.attach)), workload.n_prompt, n_gen)
        attachments = [item.attachment for item in prompt.placed]
    # `Model.stream_tokens` does the next three by itself; one by one, they have phases of their own.
    for kind in ("image", "audio"):
        if found := [item for item in attachments if item.kind == kind]:
            with run.phase(f"{kind} encode"):
                model.encode(found)
    assert isinstance(model.decoder, DeferredDecoder)
    with run.phase("decoder load"):
        model.decoder.load()
    load_s = run.seconds[-1]
    tokens = iter(model.stream_tokens(prompt, max_tokens=n_gen + 1))
    with run.phase("prefill"):
        next(tokens)
    with run.phase("decode"):
        decoded = sum(1 for _ in tokens)
    if decoded != n_gen:
        raise DeviceError(f"{decoded} tokens came of the {n_gen} that were to be decoded")
    prefill, decode = (int(1e9 * seconds) for seconds in run.seconds[-2:])
    length = len(prompt.ids)
    return RunReport(
        load_s=load_s,
        cached_bytes=cached,
        context=model.decoder.context,
        soft_tokens=prompt.soft_tokens,
        tests=(KernelTest(length, 0, (prefill,)), KernelTest(0, decoded, (decode,), length)),
        phases=tuple(run.done),
        memory=MemoryReport(steady=read_memory(), peak=run.peak),
    )


def _prompt(model: Model, files: Sequence[Path], n_prompt: int, n_gen: int) -> Prompt:
    """Files and a text, at least `n_prompt` tokens together."""
    # Read once: what is an attachment already is taken as it is.
    parts = [part for file in files for part in model.reader.file(file) if not isinstance(part, str)]
    prompt = model.prompt("a", attach=parts)
    if (missing := n_prompt - len(prompt.ids)) > 0:
        text = prompt_text(model, len(model.prompt_ids("a")) + missing + ROOM)
        prompt = model.prompt(text, attach=parts)
    if len(prompt.ids) + n_gen > (context := model.decoder.context):
        size = f"{len(prompt.ids)} tokens of the prompt and {n_gen} of the answer"
        raise UsageError(f"{size} do not fit a context of {context}: raise --context")
    return prompt


def write_media(folder: Path, images: int, clips: int) -> list[Path]:
    """Noise as files, no two alike: photos of 12 megapixels (PPM), recordings of 30 s (WAV, 16 kHz)."""
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
