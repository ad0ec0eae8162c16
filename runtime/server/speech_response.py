"""Transcriptions and translations of recordings: the multipart form of a request, and the answer."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.errors import MediaError, printable
from gemma_edge.runtime.media.srt import srt, stitch, vtt
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.server.answer_response import LATE, Running
from gemma_edge.runtime.server.api_error import ApiError, refused
from gemma_edge.runtime.server.exchange import Exchange
from gemma_edge.runtime.server.model_pool import ModelPool, ServedModel
from gemma_edge.runtime.server.request_fields import CLOSE, check_length
from gemma_edge.runtime.server.server_metrics import ServerMetrics
from gemma_edge.runtime.server.server_options import Limits, ServerOptions
from gemma_edge.runtime.transcription import MAX_TOKENS, Spoken, speech_clips

FIELDS = 8  # of the form, the file not counted
FIELD_BYTES = 4096
COPY_BYTES = 1 << 20
FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


@dataclass(frozen=True)
class AskedSpeech:
    """A recording to be written down; the file is the request's, and gone with it."""

    file: IO[bytes]
    model: str | None
    response_format: str
    temperature: float


@asynccontextmanager
async def speech_request(request: Request, limits: Limits) -> AsyncIterator[AskedSpeech]:
    """The form of a request.

    Raises:
        ApiError: a field is malformed, too large or not supported.
    """
    counted = Request(request.scope, _counting(request.receive, limits))
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        text = "Content-Type must be multipart/form-data"
        raise ApiError(415, text, code="unsupported_media_type", headers=CLOSE)
    form = counted.form(max_files=1, max_fields=FIELDS, max_part_size=FIELD_BYTES)
    try:
        fields = await asyncio.wait_for(form.__aenter__(), limits.body_seconds)
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, text, code="timeout", headers=CLOSE) from None
    except Exception as error:
        if isinstance(error, ApiError):
            raise
        detail = getattr(error, "detail", None) or getattr(error, "message", None) or type(error).__name__
        text = f"the form is malformed: {printable(detail)}"
        raise ApiError(400, text, code="invalid_form", headers=CLOSE) from None
    try:
        yield _asked(fields.multi_items())
    finally:
        await form.__aexit__(None, None, None)


def _counting(receive: Receive, limits: Limits) -> Receive:
    length = 0

    async def counting() -> Message:
        nonlocal length
        message = await receive()
        length += len(message.get("body", b""))
        check_length(length, limits)
        return message

    return counting


def _asked(items: Sequence[tuple[str, Any]]) -> AskedSpeech:
    given: dict[str, Any] = {}
    for name, value in items:
        if name in given and name != "timestamp_granularities[]":
            raise refused(name, "is given twice")
        given[name] = value
    file = given.pop("file", None)
    if not isinstance(file, UploadFile):
        raise refused("file", "is missing", "missing_required_parameter")
    for name, value in given.items():
        if not isinstance(value, str):
            raise refused(name, "must be a text, not a file", "invalid_type")
    form = given.pop("response_format", "json")
    if form not in FORMATS:
        raise refused("response_format", f"must be one of {', '.join(FORMATS)}")
    if given.pop("timestamp_granularities[]", "segment") != "segment":
        raise refused("timestamp_granularities[]", 'must be "segment"', "unsupported_value")
    if given.pop("stream", "false").lower() != "false":
        raise refused("stream", "is not supported", "unsupported_parameter")
    temperature = _number(given.pop("temperature", "0"))
    model = given.pop("model", None)
    for name in given:
        raise refused(name, "is not supported", "unsupported_parameter")
    return AskedSpeech(file.file, model, form, temperature)


def _number(text: str) -> float:
    try:
        value = float(text) if len(text) < 32 else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise refused("temperature", "must be a number from 0 to 10")
    return value


class SpeechResponse:
    """An ASGI application that answers one request.

    Args:
        prompt: what the model is asked for each segment.
        task: "transcribe" or "translate".
    """

    def __init__(
        self,
        pool: ModelPool,
        served: ServedModel,
        asked: AskedSpeech,
        exchange: Exchange,
        *,
        prompt: str,
        task: str,
        options: ServerOptions,
        metrics: ServerMetrics,
        running: Running,
    ) -> None:
        self._pool, self._served, self._asked, self._exchange = pool, served, asked, exchange
        self._prompt, self._task = prompt, task
        self._options, self._metrics, self._running = options, metrics, running
        self._cues: list[Spoken] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError if nothing was sent yet."""
        if not await self._running.unless_left(receive, self._write_down()):
            self._exchange.outcome = "client_left"
            return
        form, cues = self._asked.response_format, self._cues
        self._exchange.status = 200
        response = WRITERS[form](cues, self._task)
        await response(scope, receive, send)

    async def _write_down(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="gemma-edge-speech-") as file:
            async with self._pool.use(self._served) as model:
                path = Path(file.name)
                await asyncio.to_thread(self._check, model, file, path)
                clips = speech_clips(model, path)
                deadline = time.monotonic() + self._options.deadline_s
                while (clip := await asyncio.to_thread(next, clips, None)) is not None:
                    await self._segment(model, *clip, deadline=deadline)

    def _check(self, model: Model, file: IO[bytes], path: Path) -> None:
        """Copies the recording to a file and reads it to its end, before the engine sees any of it."""
        while block := self._asked.file.read(COPY_BYTES):
            file.write(block)
        file.flush()
        most = self._options.limits.audio_seconds
        try:
            for segment in model.reader.segments(path):
                if segment.end > most:
                    raise refused("file", f"is longer than {most:g} s", "audio_too_long")
        except MediaError as error:  # the client knows the file by another name
            raise MediaError("file", error.field, error.expected, error.got, error.remedy) from None

    async def _segment(self, model: Model, start: float, end: float, clip: Any, *, deadline: float) -> None:
        if clip is None:
            self._cues.append(Spoken(start, end, "", "silence"))
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise LATE
        async with model.agenerate(
            self._prompt,
            attach=[clip],
            temperature=self._asked.temperature,
            max_tokens=MAX_TOKENS,
            client=self._exchange.client,
            timeout=left,
        ) as answer:
            completion = await answer
        if self._exchange.ttft_s is None:
            self._exchange.ttft_s = time.perf_counter() - self._exchange.started
            self._metrics.first_piece(self._exchange.ttft_s)
        self._exchange.answered(_added(self._exchange.completion, completion))
        self._cues.append(Spoken(start, end, completion.text.strip(), completion.finish_reason))


def _added(before: Completion | None, segment: Completion) -> Completion:
    """A segment's answer, with the tokens of those before."""
    if before is None:
        return segment
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "soft_tokens")
    sums = {name: getattr(before.usage, name) + getattr(segment.usage, name) for name in names}
    return replace(segment, usage=replace(segment.usage, **sums))


def _verbose(cues: Sequence[Spoken], task: str) -> Response:
    segments = [
        {"id": index, "start": cue.start, "end": cue.end, "text": cue.line}
        for index, cue in enumerate(cue for cue in cues if cue.line)
    ]
    duration = cues[-1].end if cues else 0.0
    return JSONResponse({"task": task, "duration": duration, "text": stitch(cues), "segments": segments})


WRITERS: Mapping[str, Callable[[Sequence[Spoken], str], Response]] = {
    "json": lambda cues, task: JSONResponse({"text": stitch(cues)}),
    "text": lambda cues, task: PlainTextResponse(stitch(cues) + "\n"),
    "srt": lambda cues, task: PlainTextResponse(srt(cues), media_type="application/x-subrip"),
    "vtt": lambda cues, task: PlainTextResponse(vtt(cues), media_type="text/vtt"),
    "verbose_json": _verbose,
}
