"""Questions with one right answer each: read, asked, and counted.

TASKS is a JSON lines file, one question a line:

    {"task": "arithmetic", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "answer": "7"}

Messages are as `Model.generate` takes them; files of images and recordings are named relative to TASKS.
Answers are greedy, and right when they are `answer` to the letter, but for white space around it. A line may
have `tools`, a list of JSON schemas, and `tool_convention`; an `answer` of calls is a JSON list of them:

    [{"name": "get_weather", "arguments": {"city": "Oslo"}}]
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.records.record import Score
from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, Convention, ToolCall

Json = dict[str, Any]

MARGIN_TOKENS = 8  # that an answer may be longer than the right one before it is cut off
MEDIA = ("image", "audio", "video")


@dataclass(frozen=True)
class Question:
    """A line of TASKS.

    Attributes:
        task: what it belongs to; results are counted by it.
        messages: the conversation, up to the user's last turn; paths of files are whole.
        answer: the right one.
        place: file and line, for errors.
        tools, tool_convention: see `GenerateOptions`.
    """

    task: str
    messages: list[Json]
    answer: str
    place: str
    tools: list[Json] | None = None
    tool_convention: Convention | None = None

    @property
    def kind(self) -> str:
        """ "text", or the medium it is about: "image", "audio", "video"."""
        parts = [part for m in self.messages if isinstance(m.get("content"), list) for part in m["content"]]
        kinds = [part["type"] for part in parts if isinstance(part, dict) and part.get("type") in MEDIA]
        return kinds[0] if kinds else "text"


@dataclass(frozen=True)
class Answered:
    """What a bundle said to one question."""

    task: str
    answer: str
    got: str

    @property
    def right(self) -> bool:
        return self.got == self.answer


def interval(score: Score, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of 95 % for the share that more such questions would give."""
    n, p = score.total, score.share
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)  # rounding may leave them


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON lines file.

    Raises:
        UsageError: it cannot be read, is no such file, or has no question; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a file of questions: {error}") from None
    questions = [
        _question(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise UsageError(f"{path}: has no question")
    return questions


def _question(line: str, place: str, folder: Path) -> Question:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place}: expected a JSON object, got {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{place}: expected a JSON object")
    task, messages, answer = (data.get(key) for key in ("task", "messages", "answer"))
    if not (isinstance(task, str) and isinstance(answer, str) and isinstance(messages, list) and messages):
        raise UsageError(f"{place}: expected the texts `task` and `answer`, and the list `messages`")
    if not all(isinstance(message, dict) for message in messages):
        raise UsageError(f"{place}: every message must be an object with `role` and `content`")
    tools, convention = data.get("tools"), data.get("tool_convention")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f"{place}: `tools` must be a list of JSON schemas")
    if convention is not None and convention not in CONVENTIONS:
        raise UsageError(f"{place}: `tool_convention` must be {' or '.join(CONVENTIONS)}, not {convention!r}")
    located = [_located(message, folder) for message in messages]
    return Question(task, located, answer, place, tools, convention)


def _located(message: Json, folder: Path) -> Json:
    """The message with the paths of its files below `folder`."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA and isinstance(part.get(kind), str):
            part = {**part, kind: str(folder / part[kind])}
        parts.append(part)
    return {**message, "content": parts}


def ask(model: Model, question: Question) -> Completion:
    """What `model` says to `question`, greedily, in few more tokens than the right answer has.

    Raises:
        UsageError, MediaError: it cannot be asked; the message names its line.
    """
    limit = len(model.tokenizer.encode(question.answer, bos=False)) + MARGIN_TOKENS
    try:
        return model.generate(
            question.messages,
            max_tokens=limit,
            temperature=0.0,
            tools=question.tools,
            tool_convention=question.tool_convention,
        )
    except UsageError as error:
        raise UsageError(f"{question.place}: {error}") from None
    except MediaError as error:
        raise MediaError(
            error.path, error.field, error.expected, error.got, f"Asked by {question.place}"
        ) from None


def answers(model: Model, questions: Iterable[Question]) -> Iterator[Answered]:
    """What `ask` gives for each question, and raises."""
    for question in questions:
        said = ask(model, question)
        yield Answered(question.task, question.answer.strip(), as_answer(said.text, said.tool_calls))


def as_answer(text: str, calls: Sequence[ToolCall]) -> str:
    """What was said, as a question's `answer` has it: the calls as JSON if there are any, else the text."""
    if not calls:
        return text.strip()
    listed = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return json.dumps(listed, ensure_ascii=False)


def scores(given: Iterable[Answered]) -> dict[str, Score]:
    """By task, in the order of the questions."""
    counts: dict[str, list[bool]] = {}
    for one in given:
        counts.setdefault(one.task, []).append(one.right)
    return {task: Score(sum(right), len(right)) for task, right in counts.items()}


def agreement(one: Iterable[Answered], other: Iterable[Answered]) -> float:
    """The share of questions to which two bundles gave the same answer, right or not."""
    same = [a.got == b.got for a, b in zip(one, other, strict=True)]
    return sum(same) / len(same)


def take(questions: list[Question], each: int | None, tasks: Iterable[str] = ()) -> list[Question]:
    """The first `each` questions of every task, or of those named.

    Raises:
        UsageError: a task that no question belongs to, or `each` below 1.
    """
    if each is not None and each < 1:
        raise UsageError(f"--each must be 1 or more, not {each}")
    known, wanted = {question.task for question in questions}, set(tasks)
    if unknown := wanted - known:
        raise UsageError(
            f"no question belongs to {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}"
        )
    counts: dict[str, int] = {}
    taken = []
    for question in questions:
        counts[question.task] = counts.get(question.task, 0) + 1
        if (not wanted or question.task in wanted) and (each is None or counts[question.task] <= each):
            taken.append(question)
    return taken


def to_json(given: list[Answered], seconds: float) -> Json:
    """Scores by task, and every answer."""
    by_task = {
        task: {"right": score.right, "total": score.total, "share": round(score.share, 4)}
        for task, score in scores(given).items()
    }
    return {"tasks": by_task, "seconds": round(seconds, 2), "answers": [asdict(one) for one in given]}


def format_scores(by_task: Mapping[str, Score]) -> str:
    """A line a task, and one for all of them."""
    everything = Score(sum(s.right for s in by_task.values()), sum(s.total for s in by_task.values()))
    rows = [*by_task.items(), *([("all", everything)] if len(by_task) > 1 else [])]
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, score in rows:
        low, high = interval(score)
        counts = f"{score.right:>5} of {score.total:<5} {score.share:>6.1%}"
        lines.append(f"{name:<{width}}  {counts}  ({low:.1%} to {high:.1%})")
    return "\n".join(lines)
