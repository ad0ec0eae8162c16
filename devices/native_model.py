"""`NativeModel`: a `Model` that answers on a device without Python, by the native runner.

    with open_device("adb") as device, NativeModel.load("out.litertlm") as model:
        model.connect(device)
        print(model.generate("Why is the sky blue?").text)

The bundle's tokenizer and template work here; weights are only needed there. Attachments are read here, and
sent as the pixels and samples that the encoders take.
"""

from __future__ import annotations

import base64
import io
import secrets
import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.devices.base import Progress
from gemma_edge.devices.native_program import Done, NativeProgram
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.runner_files import ANSWER, checked_runner
from gemma_edge.runtime.answers import Cancellation, TokenSource
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.generate_options import GenerateOptions, sampling_from
from gemma_edge.runtime.install_hint import install_hint
from gemma_edge.runtime.media.attachments import MODALITY, Attachment
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.chat_template import Message
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.sampling import Sampler, Sampling
from gemma_edge.runtime.usage import GenerationProgress

# What the runner takes of `GenerateOptions`, and what `check` looks at closer. The rest needs logits, which
# the engine keeps to itself.
_TAKEN = frozenset(
    "system attach truncate max_tokens stop guard timeout client temperature top_k top_p seed min_p "
    "repetition_penalty".split()
)
_RATE = 16_000  # of all clips
_END = -1  # stands for the token that ends an answer


class NativeModel(Model):
    """See the module. `load` it with `defer_decoder=True`: nothing of the decoder is needed here."""

    _device: FileDevice
    _start: Callable[[frozenset[str]], NativeProgram]
    _program: NativeProgram | None = None
    _known: list[Any] | None = (
        None  # the sampling and the messages of the conversation there; None: not known
    )
    _held = 0

    def connect(
        self,
        device: FileDevice,
        *,
        threads: int | None = None,
        runner: Path | None = None,
        sending: Callable[[str], Progress | None] = lambda name: None,
    ) -> None:
        """Says where to answer. The model is sent with the first question.

        Args:
            threads: of the engine; None for one a fast core.
            runner: the folder that build.sh made, instead of the one in the cache.
            sending: shows how far a transfer of that name is.

        Raises:
            UsageError, DeviceError: as `checked_runner`.
        """
        assert self.bundle is not None  # it was loaded
        model, cores = self.bundle.path, threads or len(device.facts.big_cores) or 1
        checked_runner(device, ANSWER, model, runner)
        self._device, self._seed = device, secrets.randbelow(1 << 31)

        def start(kinds: frozenset[str]) -> NativeProgram:
            context, shown = self.decoder.context, sending(model.name)
            return NativeProgram(
                device, model, threads=cores, context=context, kinds=kinds, runner=runner, progress=shown
            )

        self._start = start

    @property
    def position(self) -> int:
        return self._held

    def encode(self, attachments: Sequence[Attachment]) -> None:
        """Nothing: the runner encodes what it is sent."""

    def close(self) -> None:
        self._end_program()
        super().close()

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises UsageError for an option of `generate` that the runner cannot follow."""
        sampling = sampling_from(options, self.sampling)
        refused = [name for name, value in options.items() if value and name not in _TAKEN]
        refused += [name for name in ("min_p", "repetition_penalty") if _is_changed(sampling, name)]
        if options.get("logprobs") is not None or refused:
            name = "logprobs" if not refused else refused[0]
            raise UsageError(
                f"{self._device.spec}: the native runner takes no {name.replace('_', '-')}. Leave it out, or "
                "answer here or behind ssh"
            )

    def _source(
        self,
        prompt: Prompt,
        sampler: Sampler,
        options: GenerateOptions,
        cancelled: Cancellation,
        progress: GenerationProgress,
    ) -> TokenSource:
        self.check(options)
        # Checks the lengths; nothing is computed here.
        super()._source(prompt, sampler, options, cancelled, progress).tokens.close()
        room = self.decoder.context - len(prompt.ids)
        most, said = min(options.get("max_tokens") or room, room), _Said()
        numbers = self._numbers(sampling_from(options, self.sampling))
        return TokenSource(self._answer(prompt, numbers, most, cancelled, progress, said), said, {_END})

    def _answer(
        self,
        prompt: Prompt,
        sampling: tuple[float, ...],
        most: int,
        cancelled: Cancellation,
        progress: GenerationProgress,
        said: _Said,
    ) -> Generator[int, None, None]:
        *before, last = _spelled(prompt)
        program = self._running({item.attachment.kind for item in prompt.placed})
        known, cached = [sampling, *before], self._held
        if known != self._known:
            program.begin(sampling, before)
            cached = 0
        self._known = None
        ends: list[Done] = []
        try:
            with closing(program.ask(last, most, cancelled, ends.append)) as pieces:
                for piece in pieces:
                    progress.completion_tokens += 1
                    yield said.add(piece)
        finally:
            for end in ends:
                self._held = end.held
                _count(end, cached, progress)
        if ends and ends[0].how == "end" and ends[0].decoded < most:
            self._known = [*known, last, _message("assistant", said.text)]
            yield _END

    def _running(self, kinds: set[str]) -> NativeProgram:
        """The program with the encoders of these kinds of attachments, started by now."""
        if self._program is None or not self._program.idle or not kinds <= self._program.kinds:
            had = frozenset() if self._program is None else self._program.kinds
            self._end_program()
            self._program = self._start(had | kinds).__enter__()
        return self._program

    def _end_program(self) -> None:
        program, self._program, self._known = self._program, None, None
        if program is not None:
            program.__exit__()

    def _numbers(self, sampling: Sampling) -> tuple[float, ...]:
        """Temperature, top-k, top-p and seed, as the engine takes them."""
        if sampling.temperature == 0:
            return (1.0, 1, 1.0, 0)
        seed = self._seed if sampling.seed is None else sampling.seed
        return (sampling.temperature, sampling.top_k or self.tokenizer.vocab_size, sampling.top_p, seed)


class _Said:
    """Pieces of an answer by their numbers, in the place of token ids; see `TokenText`."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, piece: str) -> int:
        self._pieces.append(piece)
        return len(self._pieces) - 1

    def push(self, token_id: int, /) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""

    @property
    def text(self) -> str:
        return "".join(self._pieces)


def _is_changed(sampling: Sampling, name: str) -> bool:
    return bool(getattr(sampling, name) != getattr(Sampling(), name))


def _count(end: Done, cached: int, progress: GenerationProgress) -> None:
    """Puts the engine's own figures into a progress: it does not pad audio, so prompts may be shorter."""
    progress.prompt_tokens, progress.cached_tokens = cached + end.prefilled, cached
    progress.completion_tokens = end.decoded
    progress.prefill_s = end.prefilled / end.prefill_rate if end.prefill_rate else 0.0
    step = 1 / end.decode_rate if end.decode_rate else 0.0
    progress.first_token_s, progress.decode_s = step, step * max(0, end.decoded - 1)


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _spelled(prompt: Prompt) -> list[Message]:
    """The messages of a prompt as the engine takes them, with the data of their attachments."""
    attachments = iter([item.attachment for item in prompt.placed])
    spelled: list[Message] = []
    for message in prompt.messages:
        content = message["content"]
        if isinstance(content, str):
            spelled.append(_message(message["role"], content))
            continue
        parts = [_spelled_part(next(attachments)) if part["type"] in MODALITY else part for part in content]
        spelled.append({"role": message["role"], "content": parts})
    return spelled


def _spelled_part(attachment: Attachment) -> dict[str, str]:
    data = _png(attachment.data) if attachment.kind == "image" else _wav(attachment.data)
    return {"type": attachment.kind, "blob": base64.b64encode(data).decode()}


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """u8 (3, size, size) as a file."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(f"images need pillow: {install_hint('images')}") from None
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _wav(samples: NDArray[np.float32]) -> bytes:
    """f32 (n,) at 16 kHz as a file of floats."""
    data = np.ascontiguousarray(samples, "<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, _RATE, 4 * _RATE, 4, 32)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
