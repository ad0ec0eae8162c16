"""`NativeProgram`: `gemma-answer` running on a device, and what is said to it and by it.

Requests are lines of a file there that grows, which the program reads as its stdin: a phone's shell may not
make a FIFO. Events are lines of its stdout. `android_demo/bench/gemma_answer.c` lists both.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.devices.base import Progress
from gemma_edge.devices.live_run import ENDING_S, LiveRun
from gemma_edge.devices.push import FileDevice
from gemma_edge.devices.run_folder import RunFolder
from gemma_edge.devices.runner_files import ANSWER, checked_runner, send_runner
from gemma_edge.runtime.answers import Cancellation
from gemma_edge.runtime.errors import BundleError, DeviceError

_WHAT = "the native runner"
_OURS = f"{ANSWER}: error: "  # begins its own lines on stderr; the engine's logs are others
_BAD_MODEL = 3  # exit code
_LISTEN_S = 0.1  # seconds between two looks at whether the answer is still wanted
_AGAIN_S = 1.0  # seconds after which an answer is interrupted again


@dataclass(frozen=True)
class Done:
    """The end of an answer: "end", "full" (of the context, or of its length) or "cancelled".

    `prefilled` and `decoded` count tokens, the rates are tokens a second, and `held` is what the conversation
    takes of the context.
    """

    how: str
    prefilled: int
    decoded: int
    prefill_rate: float
    decode_rate: float
    held: int

    @classmethod
    def parse(cls, text: str) -> Done:
        how, prefilled, decoded, prefill_rate, decode_rate, held = text.split()
        return cls(how, int(prefilled), int(decoded), float(prefill_rate), float(decode_rate), int(held))


class NativeProgram:
    """A context that starts the program and ends it.

    Args:
        model: a .litertlm here.
        threads, context: of the engine.
        kinds: of attachments whose encoders it loads, "image" and "audio".
        runner: the folder that build.sh made, instead of the one in the cache.
        progress: of what is sent.

    Attributes:
        idle: it waits for a request; False for good once it was lost, or an answer was abandoned.
    """

    def __init__(
        self,
        device: FileDevice,
        model: Path,
        *,
        threads: int,
        context: int,
        kinds: frozenset[str] = frozenset(),
        runner: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kinds, self.idle, self._device, self._model = kinds, True, device, model
        self._options = [
            str(threads),
            str(context),
            *(str(int(each in kinds)) for each in ("image", "audio")),
        ]
        self._runner, self._progress = runner, progress
        self._stack = contextlib.ExitStack()
        self._events: queue.Queue[str | BaseException | None] = queue.Queue()
        self._last_words = ""

    def __enter__(self) -> NativeProgram:
        """Raises as `checked_runner` and `send_runner`."""
        folder = checked_runner(self._device, ANSWER, self._model, self._runner)
        with contextlib.ExitStack() as stack:
            words = send_runner(self._device, folder, ANSWER, self._model, self._progress)
            run = stack.enter_context(RunFolder(self._device))
            self._requests = run.write("requests", b"")
            self._live = LiveRun(
                self._device,
                [*words, *self._options],
                folder=run.cwd,
                stdin=self._requests,
                on_error_line=self._note,
                what=_WHAT,
            )
            stack.enter_context(self._live)
            self._listener = threading.Thread(target=self._listen, name="native-program", daemon=True)
            self._listener.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._listener.is_alive():
                with contextlib.suppress(DeviceError):
                    self._live.signal("TERM")
                self._listener.join(ENDING_S)
        finally:
            self._stack.close()

    def begin(self, sampling: Sequence[float], messages: Sequence[Any]) -> None:
        """A conversation after these messages.

        Args:
            sampling: temperature, top-k, top-p, seed.

        Raises:
            DeviceError: the device is gone.
        """
        numbers = " ".join(f"{number:.9g}" for number in sampling)
        self.idle = False
        self._request(f"new {numbers} {json.dumps(messages)}")
        self.idle = True

    def ask(
        self, message: Any, most: int, cancelled: Cancellation, told: Callable[[Done], None]
    ) -> Generator[str, None, None]:
        """The pieces of the answer to a message.

        Args:
            most: tokens of the answer.
            cancelled: ends it early.
            told: how it ended.

        Raises:
            DeviceError: the engine failed, or the device is gone.
            BundleError: the engine refuses the model.
        """
        self.idle = False
        self._request(f"say {most} {json.dumps(message)}")
        try:
            yield from self._pieces(cancelled, told)
        except GeneratorExit:  # what it still says belongs to this answer
            cancelled.set()
            for _ in self._pieces(cancelled, told):
                pass
            raise

    def _pieces(self, cancelled: Cancellation, told: Callable[[Done], None]) -> Iterator[str]:
        interrupted = 0.0  # when; one that comes before the program has read the request is lost
        while not self.idle:
            word, _, rest = (self._event() or "").partition(" ")
            if word == "error":
                self.idle = True
                raise self._device.error(f"{_WHAT} gave no answer: {rest}")
            if word == "done":
                self.idle = True
                told(Done.parse(rest))
            elif word == "piece" and not interrupted:
                yield "".join(part.get("text", "") for part in json.loads(rest)["content"])
            if not self.idle and cancelled.is_set() and time.monotonic() > interrupted + _AGAIN_S:
                self._live.signal("INT")
                interrupted = time.monotonic()

    def _request(self, line: str) -> None:
        self._device.sh(f"cat >>{shlex.quote(self._requests)}", stdin=f"{line}\n".encode())

    def _event(self) -> str | None:
        """The next line that it says; None when it says nothing for a moment."""
        try:
            event = self._events.get(timeout=_LISTEN_S)
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            raise event
        if event is None:
            said = self._last_words or "it said nothing"
            if self._live.exit_code == _BAD_MODEL:
                raise BundleError(self._model, "model", "one that LiteRT-LM loads", said)
            raise self._device.error(f"{_WHAT} ended with exit code {self._live.exit_code}: {said}")
        return event

    def _listen(self) -> None:
        rest = b""
        try:
            for piece in self._live.pieces():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._events.put(line.decode("utf-8", "replace"))
            self._events.put(None)
        except (
            DeviceError,
            OSError,
            ValueError,
        ) as error:  # the latter two: it was closed while this thread read
            self._events.put(error)

    def _note(self, line: str) -> None:
        if line.startswith(_OURS) or not self._last_words.startswith(_OURS):
            self._last_words = line
