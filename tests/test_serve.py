"""`gemma-edge serve`: real processes on loopback, both engines, real clients."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.server import answer_response
from gemma_edge.runtime.server.answer_response import Running
from gemma_edge.runtime.server.asked import Asked
from gemma_edge.runtime.server.chat_answer import ChatAnswer
from gemma_edge.runtime.server.chat_request import chat_request
from gemma_edge.runtime.server.completion_answer import CompletionAnswer
from gemma_edge.runtime.server.completion_request import completion_request
from gemma_edge.runtime.server.request_fields import RequestFields
from gemma_edge.runtime.server.responses_answer import ResponsesAnswer
from gemma_edge.runtime.server.responses_request import responses_request
from gemma_edge.runtime.server.server_options import Limits
from gemma_edge.runtime.usage import Usage
from support.http_server import LONG, ServerProcess, endless, serving
from support.processes import PATIENCE_S
from support.repository import ROOT

POCKET = ROOT / "pocket" / "checkpoint"
ENGINES = {"onnx": "onnx", "tflite": "litert"}
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


# Routes. ----------------------------------------------------------------------------------------------


def test_an_answer_is_the_librarys(served: ServerProcess, pocket_bundles: dict[str, Path]) -> None:
    for temperature, seed in ((0, 1), (1.5, 2), (1.5, 3)):
        reply = served.chat("What is 2 + 3?", temperature=temperature, seed=seed, max_tokens=12)
        assert reply.status == 200
        answer = reply.json
        choice = answer["choices"][0]
        assert answer["object"] == "chat.completion" and answer["model"] == "pocket"
        streamed = served.chat(
            "What is 2 + 3?", temperature=temperature, seed=seed, max_tokens=12, stream=True
        )
        pieces = [c["delta"].get("content") or "" for e in streamed.events for c in e["choices"]]
        assert "".join(pieces) == choice["message"]["content"]
        assert streamed.events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert streamed.text.endswith("data: [DONE]\n\n")
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_seeds_give_the_librarys_answers(pocket_bundles: dict[str, Path], form: str) -> None:
    model = Model.load(pocket_bundles[form])
    with serving(pocket_bundles[form]) as process:
        for seed in range(8):
            expected = model.generate(QUESTION, temperature=1.2, seed=seed, max_tokens=16)
            answer = process.chat(QUESTION[0]["content"], temperature=1.2, seed=seed, max_tokens=16).json
            assert answer["choices"][0]["message"]["content"] == expected.text
            assert answer["choices"][0]["finish_reason"] == expected.finish_reason


def test_usage_ends_the_stream_if_asked_for(served_onnx: ServerProcess) -> None:
    reply = served_onnx.chat(stream=True, stream_options={"include_usage": True})
    last = reply.events[-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "usage" not in served_onnx.chat(stream=True).events[-1]


def test_stop_length_and_seed(served_onnx: ServerProcess) -> None:
    assert (
        served_onnx.ask("POST", "/v1/completions", endless(max_tokens=3)).json["choices"][0]["finish_reason"]
        == "length"
    )
    whole = served_onnx.ask("POST", "/v1/completions", endless(max_tokens=12)).json["choices"][0]["text"]
    middle = whole[len(whole) // 2 :][:2]
    cut = served_onnx.ask("POST", "/v1/completions", endless(max_tokens=12, stop=[middle])).json["choices"][0]
    assert cut["text"] == whole[: whole.index(middle)] and cut["finish_reason"] == "stop"


def test_logprobs(served_onnx: ServerProcess) -> None:
    choice = served_onnx.chat(logprobs=True, top_logprobs=3).json["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert tokens and all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in tokens)
    streamed = served_onnx.chat(logprobs=True, top_logprobs=3, stream=True).events
    pieces = [c["logprobs"]["content"] for e in streamed for c in e["choices"] if c["logprobs"]]
    assert [token["token"] for piece in pieces for token in piece] == [token["token"] for token in tokens]
    old = served_onnx.ask("POST", "/v1/completions", endless(max_tokens=4, logprobs=2)).json["choices"][0][
        "logprobs"
    ]
    assert len(old["tokens"]) == len(old["token_logprobs"]) == len(old["text_offset"]) == 4


def test_completions_echo(served_onnx: ServerProcess) -> None:
    reply = served_onnx.ask("POST", "/v1/completions", endless(max_tokens=2, echo=True))
    assert reply.json["choices"][0]["text"].startswith(LONG)
    streamed = served_onnx.ask("POST", "/v1/completions", endless(max_tokens=2, echo=True, stream=True))
    text = "".join(e["choices"][0]["text"] for e in streamed.events)
    assert text == reply.json["choices"][0]["text"]


def test_models(served_onnx: ServerProcess) -> None:
    listed = served_onnx.get("/v1/models").json["data"]
    assert [model["id"] for model in listed] == ["pocket"]
    assert served_onnx.get("/v1/models/pocket").json == listed[0]
    assert served_onnx.get("/v1/models/other").code == "model_not_found"
    assert served_onnx.chat(model="other").code == "model_not_found"
    assert served_onnx.chat(model="pocket").status == 200


def test_responses(served_onnx: ServerProcess) -> None:
    body = {"input": "What is 2 + 3?", "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 8}
    whole = served_onnx.ask("POST", "/v1/responses", body).json
    assert whole["status"] in ("completed", "incomplete") and whole["object"] == "response"
    streamed = served_onnx.ask("POST", "/v1/responses", {**body, "stream": True}).events
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    text = "".join(e["delta"] for e in streamed if e["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert streamed[-1]["type"] == f"response.{whole['status']}"
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "What is 2 + 3?"}]}]
    assert served_onnx.ask("POST", "/v1/responses", {**body, "input": parts}).json["output"] is not None


def test_predictions(served_onnx: ServerProcess) -> None:
    text = "One, two, three, four, five, six."
    prediction = {"type": "content", "content": [{"type": "text", "text": text}]}
    plain = served_onnx.chat(temperature=0).json
    for fields in ({"speculate": True}, {"prediction": prediction}, {"speculate": False}):
        reply = served_onnx.chat(temperature=0, **fields)
        assert reply.status == 200, reply.text
        usage = reply.json["usage"]["completion_tokens_details"]
        assert usage.keys() == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
        assert reply.json["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    for route, body in (("completions", {"prompt": text}), ("responses", {"input": text})):
        assert served_onnx.ask("POST", f"/v1/{route}", {**body, "speculate": True}).status == 200
        refused = served_onnx.ask("POST", f"/v1/{route}", {**body, "prediction": prediction})
        assert refused.code == "unsupported_parameter"


def test_predictions_become_the_librarys_option_and_its_counts_usage() -> None:
    def asked(read: Callable[..., Asked], **fields: Any) -> Any:
        return read(RequestFields(fields), Limits(), 512).options.get("speculate")

    chat = {"messages": QUESTION}
    for content, expected in (
        ("a b", "a b"),
        ([{"type": "text", "text": t} for t in "ab"], "ab"),
        ("", True),
    ):
        assert asked(chat_request, **chat, prediction={"type": "content", "content": content}) == expected
    prediction = {"type": "content", "content": "a"}
    assert asked(chat_request, **chat, prediction=prediction, speculate=True) == "a"
    for flag in (True, None):
        assert asked(chat_request, **chat, speculate=flag) is flag
        assert asked(completion_request, prompt="x", speculate=flag) is flag
        assert asked(responses_request, input="x", speculate=flag) is flag

    usage = Usage(1, 0, 8, None, None, None, drafted_tokens=7, accepted_tokens=5)
    counts = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 2}
    for form, details in (
        (ChatAnswer, "completion_tokens_details"),
        (CompletionAnswer, "completion_tokens_details"),
        (ResponsesAnswer, "output_tokens_details"),
    ):
        whole = form("m", Asked("", {})).whole(Completion("a", usage, "stop"))
        assert counts.items() <= whole["usage"][details].items()


def test_an_idle_server_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        released, running, ends = asyncio.Event(), Running(), asyncio.Event()
        monkeypatch.setattr(answer_response, "release_free_memory", released.set)
        monkeypatch.setattr(answer_response, "IDLE_S", 0)
        long = asyncio.ensure_future(running.unless_left(stays, until(ends)))
        assert await running.unless_left(stays, until(None))
        await asyncio.sleep(0)  # a turn of the loop, in which a timer of 0 s would run
        await asyncio.sleep(0)
        assert not released.is_set()  # the long one runs
        ends.set()
        assert await long
        await asyncio.wait_for(released.wait(), PATIENCE_S)

    async def stays() -> Any:
        await asyncio.Event().wait()

    async def until(event: asyncio.Event | None) -> None:
        if event:
            await event.wait()

    asyncio.run(scenario())


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 32)) -> str:
    image = pytest.importorskip("PIL.Image").new("RGB", size, colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def recording(seconds: float = 1.0) -> bytes:
    import numpy as np

    samples = (8000 * np.sin(np.arange(int(16_000 * seconds)) / 16_000 * 2 * np.pi * 440)).astype("<i2")
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return data.getvalue()


def test_images_and_audio_in_a_message(served: ServerProcess) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": picture()}},
        {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(recording()).decode(), "format": "wav"},
        },
        {"type": "text", "text": "What colour is this?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
    reply = served.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.text
    text = served.chat("What colour is this?")
    assert reply.json["usage"]["prompt_tokens"] > text.json["usage"]["prompt_tokens"] + 30


def multipart(file: bytes, **fields: str) -> tuple[bytes, dict[str, str]]:
    lines = [
        b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + file + b"\r\n"
    ]
    for name, value in fields.items():
        lines.append(f'--cut\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    return b"".join(lines) + b"--cut--\r\n", {"Content-Type": "multipart/form-data; boundary=cut"}


@pytest.mark.parametrize("form", ["json", "text", "srt", "vtt", "verbose_json"])
def test_transcriptions(served_onnx: ServerProcess, form: str) -> None:
    body, headers = multipart(recording(2.0), model="pocket", response_format=form)
    reply = served_onnx.ask("POST", "/v1/audio/transcriptions", body, headers)
    assert reply.status == 200, reply.text
    if form.endswith("json"):
        assert isinstance(reply.json["text"], str)
    if form == "vtt":
        assert reply.text.startswith("WEBVTT\n")
    translated = served_onnx.ask("POST", "/v1/audio/translations", body, headers)
    assert translated.status == 200, translated.text


def test_a_damaged_recording_is_refused(served_onnx: ServerProcess) -> None:
    body, headers = multipart(b"RIFF nothing")
    reply = served_onnx.ask("POST", "/v1/audio/transcriptions", body, headers)
    assert reply.status == 400 and "/tmp" not in reply.text
    body, headers = multipart(recording(), language="en")
    assert (
        "language is not supported" in served_onnx.ask("POST", "/v1/audio/transcriptions", body, headers).text
    )


def test_health_ready_and_metrics(served_onnx: ServerProcess) -> None:
    served_onnx.chat()
    health = served_onnx.get("/health").json
    assert health["status"] == "healthy" and health["model_loaded"]
    assert 0 < health["memory"]["rss_anon_bytes"] < health["memory"]["ceiling_bytes"]
    assert served_onnx.get("/ready").json == {"ready": True}
    text = served_onnx.get("/metrics").text
    for name in (
        'requests_total{outcome="ok",route="/v1/chat/completions"}',
        "time_to_first_token_seconds_bucket",
        "inter_token_seconds_bucket",
        'tokens_total{kind="answer"}',
        'resident_memory_bytes{kind="anon"}',
        'resident_memory_bytes{kind="file"}',
        "queue_length",
        "cache_hits_total",
    ):
        assert f"gemma_edge_{name}" in text
