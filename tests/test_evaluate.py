"""Questions with one right answer: read, asked of a bundle, counted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import questions as evaluate
from gemma_edge.benchmarks.measure.questions import (
    Answered,
    agreement,
    format_scores,
    read_questions,
    scores,
    take,
)
from gemma_edge.benchmarks.records.record import Score
from gemma_edge.cli import evaluate as verb
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model

HELLO = [{"role": "user", "content": "Hello"}]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def question(task: str = "greeting", answer: str = "Hi", messages: Any = HELLO) -> dict[str, Any]:
    return {"task": task, "messages": messages, "answer": answer}


def test_files_are_found_beside_the_questions(tmp_path: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    path = write(tmp_path, question(messages=[{"role": "user", "content": content}]), "", question())
    first, second = read_questions(path)
    assert first.messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}
    assert first.messages[0]["content"][1] == content[1]
    assert (second.messages, second.place) == (HELLO, f"{path}:3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "questions.jsonl:2: expected a JSON object, got"),
        ("[]", "questions.jsonl:2: expected a JSON object"),
        ('{"task": "a", "messages": [{}]}', "questions.jsonl:2: expected the texts `task` and `answer`"),
        ('{"task": "a", "answer": "b", "messages": []}', "questions.jsonl:2: expected the texts"),
        (
            '{"task": "a", "answer": "b", "messages": ["c"]}',
            "questions.jsonl:2: every message must be an object",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_questions(write(tmp_path, question(), line))
    assert said in str(error.value)


def test_no_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no question"):
        read_questions(write(tmp_path, ""))
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path / "missing.jsonl")


def test_some_questions_of_each_task(tmp_path: Path) -> None:
    lines = [question(task, str(i)) for i in range(3) for task in ("a", "b")]
    questions = read_questions(write(tmp_path, *lines))
    assert [(q.task, q.answer) for q in take(questions, 2)] == [
        ("a", "0"),
        ("b", "0"),
        ("a", "1"),
        ("b", "1"),
    ]
    assert [q.answer for q in take(questions, None, ["b"])] == ["0", "1", "2"]
    with pytest.raises(UsageError, match="no question belongs to c: there are a, b"):
        take(questions, None, ["c"])
    with pytest.raises(UsageError, match="--each must be 1 or more, not 0"):
        take(questions, 0)


def test_counting() -> None:
    given = [Answered("a", "1", "1"), Answered("b", "x", "x"), Answered("a", "2", "3")]
    assert scores(given) == {"a": Score(1, 2), "b": Score(1, 1)}
    assert (
        agreement(given, [Answered("a", "1", "1"), Answered("b", "x", "y"), Answered("a", "2", "3")]) == 2 / 3
    )
    # Wilson's interval of 8 in 10, as published: 0.490 to 0.943.
    assert evaluate.interval(Score(8, 10)) == pytest.approx((0.490, 0.943), abs=5e-4)
    for total in range(1, 100):  # no bound leaves 0 to 1, and none prints as -0.0%
        assert evaluate.interval(Score(0, total))[0] >= 0 and evaluate.interval(Score(total, total))[1] <= 1
    assert "all      2 of 3      66.7%" in format_scores(scores(given))


def test_a_bundle_is_right_when_it_says_the_answer(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model.load(tiny_bundle, threads=1)  # as below: the same calls give the same logits to the bit
    asked = [HELLO, [*HELLO, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]]
    said = [
        model.generate(messages, max_tokens=evaluate.MARGIN_TOKENS, temperature=0.0).text
        for messages in asked
    ]
    # Random weights do not end an answer: the right one is as long as what `eval` lets the bundle say.
    path = write(
        tmp_path,
        question("empty", "", asked[0]),
        question("wrong", "Q", asked[1]),
    )
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    assert verb.run(parser.parse_args([str(tiny_bundle), str(path), "--json", "--threads", "1"])) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tasks"]["wrong"] == {"right": 0, "total": 1, "share": 0.0}
    assert out["answers"][0]["got"] == said[0].strip()
    assert out["answers"][1]["got"].startswith(said[1].strip())
