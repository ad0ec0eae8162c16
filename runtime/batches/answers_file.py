"""Answers of a batch as JSON lines, each on disk before the next one is computed.

    {"line": 1, "key": "5f0c...", "id": "sky", "text": "...", "finish_reason": "stop", "usage": {...}}
    {"line": 2, "key": "90be...", "error": {"type": "UsageError", "message": "..."}}

`line` is that of the prompts, and `key` a hash of it, of the options and of the bundle: a batch that goes on
finds what it has, and never takes the answer to another question for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gemma_edge.runtime.batches.batch_totals import BatchTotals
from gemma_edge.runtime.errors import FileError, UsageError
from gemma_edge.runtime.files.json_shape import misfit
from gemma_edge.runtime.files.text_files import parse_json

MAX_LINE_BYTES = 64 << 20  # an answer with log-probabilities is long
BEGINNING = b'{"line": '
SHAPE = {"line": "size", "key": "text"}
ELSEWHERE = "Name another file for the answers, or remove this one."

Json = dict[str, Any]


class AnswersFile:
    """An open file of answers, which no other process writes.

    A last line that was torn is dropped, and so are errors: their prompts are asked again.

    Attributes:
        keys: of the answers that were there, by line.
        totals: of these answers.

    Raises:
        FileError: the file holds something else.
        UsageError: it is no regular file, or another process writes it.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.realpath(path))
        self.keys: dict[int, str] = {}
        self.totals = BatchTotals()
        self._file = _opened(self.path)
        try:
            spoilt = False
            for _, answer in self._answers():
                if answer is None or answer["line"] in self.keys:
                    spoilt = True
                else:
                    self.keys[answer["line"]] = answer["key"]
                    self.totals.add(answer)
            if spoilt:
                self._rewrite()
            self._sync_folder()
        except BaseException:
            self.close()
            raise

    def append(self, answer: Mapping[str, Any]) -> None:
        """Writes a line; when this returns, it is on disk.

        Raises:
            OSError: it cannot be written; names the file.
        """
        text = json.dumps(answer, ensure_ascii=False)
        rest = text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate, as JSON has it
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Lets other processes write the file."""
        self._file.close()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self) -> Iterator[tuple[bytes, Json | None]]:
        """Lines and what they say; None for an error, and for a last line that is torn."""
        self._file.seek(0)
        number = 0
        while raw := self._file.readline(MAX_LINE_BYTES):
            number += 1
            if not raw.endswith(b"\n") and (raw.startswith(BEGINNING) or BEGINNING.startswith(raw)):
                yield raw, None
                return
            answer = parse_json(raw, self.path, FileError, field=f"line {number}", remedy=ELSEWHERE)
            if found := misfit(answer, SHAPE) or _no_integer(answer):
                where, expected = found
                raise FileError(self.path, f"line {number}, {where}", expected, answer.get(where), ELSEWHERE)
            yield raw, None if "error" in answer else answer

    def _rewrite(self) -> None:
        """The file with its good lines alone: the old one, or this, whatever happens."""
        beside = self.path.with_name(f".{self.path.name}.tmp")
        beside.unlink(missing_ok=True)
        new = _opened(beside)
        try:
            written = set()
            for raw, answer in self._answers():
                if answer is not None and answer["line"] not in written:
                    written.add(answer["line"])
                    new.write(raw)
            new.flush()
            os.fsync(new.fileno())
            beside.replace(self.path)
        except BaseException:
            new.close()
            beside.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some file systems sync no folders
                os.fsync(folder)
        finally:
            os.close(folder)


def _opened(path: Path) -> IO[bytes]:
    """The file for this process alone."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o666)
        except IsADirectoryError:
            raise UsageError(f"{path}: answers go into a file, and this is a folder") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise UsageError(f"{path}: answers go into a regular file, and this is a device or a pipe")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UsageError(f"{path}: another process writes answers into it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == status.st_ino:
                return open(descriptor, "a+b")
        os.close(descriptor)  # another process replaced the file in between


def _no_integer(answer: Json) -> tuple[str, str] | None:
    return None if isinstance(answer["line"], int) else ("line", "an integer")
