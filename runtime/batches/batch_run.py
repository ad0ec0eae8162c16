"""`run_batch`: the answers to a file of prompts, which can be interrupted at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

from gemma_edge.runtime.batches.answers_file import ELSEWHERE, AnswersFile
from gemma_edge.runtime.batches.batch import BatchAnswer, BatchRequest, batch_answers
from gemma_edge.runtime.batches.batch_totals import BatchTotals
from gemma_edge.runtime.batches.prompts_file import BatchLine, read_prompts
from gemma_edge.runtime.errors import FileError, GemmaEdgeError
from gemma_edge.runtime.generate_options import GenerateOptions
from gemma_edge.runtime.model import Model

Json = dict[str, Any]


class BatchRun:
    """A batch: its lines, and those that are answered already.

    Args:
        prompts: JSON lines; see `prompts_file`.
        answers: what there is already; None to begin anew.
        options: of every prompt that does not say otherwise.

    Attributes:
        total: prompts.
        totals: of the answers so far, those of earlier runs included.
        errors: of this run, by line.

    Raises:
        FileError: the prompts cannot be read, or the answers are to other prompts.
    """

    def __init__(
        self,
        model: Model,
        prompts: str | Path,
        answers: AnswersFile | None = None,
        **options: Unpack[GenerateOptions],
    ) -> None:
        self.model, self.prompts, self.options = model, Path(prompts), options
        self.totals = BatchTotals() if answers is None else answers.totals
        self.errors: dict[int, GemmaEdgeError] = {}
        self._salt = self._hash_of_model_and_options()
        self._done = {} if answers is None else answers.keys
        self.total = 0
        missing = set(self._done)
        for line in read_prompts(self.prompts):
            self.total += 1
            missing.discard(line.number)
            if self._done.get(line.number, self._key(line)) != self._key(line):
                self._refuse(answers, line.number)
        if missing:
            self._refuse(answers, min(missing))

    def answer(self) -> Iterator[Json]:
        """The lines of answers that are missing, each as soon as it is there: JSON values.

        Raises:
            GemmaEdgeError: the model cannot be used.
        """
        waiting: dict[int, BatchLine] = {}
        wrong: list[BatchLine] = []

        def requests() -> Iterator[BatchRequest]:
            index = 0
            for line in read_prompts(self.prompts):
                if line.number in self._done:
                    continue
                if line.request is None:
                    wrong.append(line)
                    continue
                waiting[index] = line
                index += 1
                yield line.request

        for answer in batch_answers(self.model, requests(), self.options):
            while wrong:
                line = wrong.pop(0)
                yield self._counted(line, BatchAnswer(0, error=line.error))
            yield self._counted(waiting.pop(answer.index), answer)
        for line in wrong:
            yield self._counted(line, BatchAnswer(0, error=line.error))

    def _counted(self, line: BatchLine, answer: BatchAnswer) -> Json:
        said: Json = {"line": line.number, "key": self._key(line)}
        if line.id is not None:
            said["id"] = line.id
        if answer.completion is not None:
            said |= answer.completion.to_dict()
        elif answer.error is not None:
            self.errors[line.number] = answer.error
            said["error"] = {"type": type(answer.error).__name__, "message": str(answer.error)}
        self.totals.add(said)
        return said

    def _key(self, line: BatchLine) -> str:
        return hashlib.sha256(self._salt + line.raw).hexdigest()[:32]

    def _hash_of_model_and_options(self) -> bytes:
        bundle = self.model.bundle
        given = {name: value for name, value in self.options.items() if not _is_default(value)}
        said = [None if bundle is None else bundle.manifest, given]
        text = json.dumps(said, sort_keys=True, default=_named)
        return hashlib.sha256(text.encode()).digest()

    def _refuse(self, answers: AnswersFile | None, number: int) -> None:
        where = "answers" if answers is None else answers.path
        raise FileError(
            where,
            f"the answer to line {number}",
            f"one to line {number} of {self.prompts}, by this bundle with these options",
            "the answer to another prompt",
            ELSEWHERE,
        )


def _named(value: Any) -> Any:
    """What tells an option that is no JSON from others: a tool, a function."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return getattr(value, "__qualname__", type(value).__qualname__)


def _is_default(value: object) -> bool:
    """Whether an option says nothing."""
    return value is None or value is False or (isinstance(value, list | tuple | dict) and not value)


def run_batch(
    model: Model,
    prompts: str | Path,
    answers: str | Path,
    *,
    progress: Callable[[BatchRun], None] = lambda run: None,
    **options: Unpack[GenerateOptions],
) -> BatchTotals:
    """Answers a file of prompts into a file of answers; one that was interrupted goes on where it stopped.

    Args:
        progress: is called before the first answer and after each.

    Raises:
        FileError: a file cannot be read, or `answers` holds something else.
        UsageError: another process writes `answers`.
    """
    with AnswersFile(answers) as file:
        run = BatchRun(model, prompts, file, **options)
        progress(run)
        for answer in run.answer():
            file.append(answer)
            progress(run)
        return run.totals
