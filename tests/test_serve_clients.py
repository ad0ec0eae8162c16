"""Unmodified clients against a real server: openai (Python, npm), curl, litellm, llm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.http_server import ServerProcess

openai = pytest.importorskip("openai")

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Switches a light.",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "enum": ["kitchen", "bath"]},
                "on": {"type": "boolean"},
            },
            "required": ["room", "on"],
        },
    },
}
MESSAGES: Any = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture
def client(served: ServerProcess) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openai_chat(client: Any) -> None:
    options = {
        "model": "pocket",
        "messages": MESSAGES,
        "max_tokens": 8,
        "temperature": 0,
        "seed": 3,
        "user": "anna",
    }
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert client.models.list().data[0].id == "pocket"


def test_openai_tools(client: Any) -> None:
    pytest.importorskip("llguidance")
    messages = [{"role": "user", "content": "Turn on the light in the kitchen."}]
    options: dict[str, Any] = {"model": "pocket", "messages": messages, "tools": [TOOL], "temperature": 0}
    options |= {"tool_choice": "required", "max_tokens": 100}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "set_light"
    assert json.loads(call.function.arguments).keys() == {"room", "on"}
    deltas = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    streamed = [t for delta in deltas for t in delta.delta.tool_calls or []]
    assert streamed[0].function.arguments == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls"
    history = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = client.chat.completions.create(model="pocket", messages=[*history, result], max_tokens=4)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_openai_structured_answers(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for temperature in (0, 2):
        answer = client.chat.completions.create(
            model="pocket", messages=MESSAGES, response_format=form, temperature=temperature, max_tokens=60
        )
        assert json.loads(answer.choices[0].message.content)["sum"] in range(100)


def test_openai_responses(client: Any) -> None:
    options = {"model": "pocket", "input": "What is 2 + 3?", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == whole.output_text


def test_openai_transcriptions(client: Any, tmp_path: Path) -> None:
    from test_serve import recording

    file = tmp_path / "a.wav"
    file.write_bytes(recording(2.0))
    with file.open("rb") as opened:
        assert isinstance(client.audio.transcriptions.create(model="pocket", file=opened).text, str)


def test_openai_errors_have_their_classes(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"frequency_penalty is not supported") as caught:
        client.chat.completions.create(model="pocket", messages=MESSAGES, frequency_penalty=1)
    assert caught.value.param == "frequency_penalty" and caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="pocket", prompt="two three " * 1000)
    assert caught.value.code == "context_length_exceeded"


def test_openai_leaves_a_stream(client: Any, served: ServerProcess) -> None:
    from support.http_server import endless
    from support.processes import wait_for

    with client.completions.create(model="pocket", stream=True, **endless()) as stream:
        next(iter(stream))
    wait_for(lambda: not served.get("/health").json["queue"]["running"], "the answer went on")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(served: ServerProcess) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True})
    command = ["curl", "-sSN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", body], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


NPM = """
const OpenAI = require("openai").default;
const client = new OpenAI({baseURL: process.argv[1], apiKey: "none", maxRetries: 0});
(async () => {
  const messages = [{role: "user", content: "What is 2 + 3?"}];
  const options = {model: "pocket", messages, max_tokens: 8, temperature: 0};
  const whole = await client.chat.completions.create(options);
  let text = "";
  for await (const chunk of await client.chat.completions.create({...options, stream: true}))
    text += chunk.choices[0]?.delta?.content ?? "";
  console.log(JSON.stringify([whole.choices[0].message.content, text]));
})();
"""


def has_npm_openai() -> bool:
    """Whether node finds the package openai: installed here, or below $NODE_PATH."""
    if not shutil.which("node"):
        return False
    command = ["node", "-e", 'require.resolve("openai")']
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_npm_openai(), reason="needs node and its package openai ($NODE_PATH)")
def test_npm_openai(served: ServerProcess) -> None:
    command = ["node", "-e", NPM, f"{served.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    whole, text = json.loads(done.stdout)
    assert whole == text == served.chat().json["choices"][0]["message"]["content"]


def test_litellm(served: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask GitHub for prices
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {"model": "openai/pocket", "api_base": f"{served.url}/v1", "api_key": "none"}
    options |= {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "user": "anna"}
    whole = litellm.completion(**options).choices[0].message.content
    stream = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    assert whole == served.chat().json["choices"][0]["message"]["content"]


@pytest.mark.skipif(not shutil.which("llm"), reason="needs llm")
def test_llm(served: ServerProcess, tmp_path: Path) -> None:
    models = f"- model_id: pocket\n  model_name: pocket\n  api_base: {served.url}/v1\n  api_key_name: none\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    (tmp_path / "keys.json").write_text('{"none": "none"}')
    command = ["llm", "-m", "pocket", "What is 2 + 3?", "-o", "temperature", "0", "-o", "max_tokens", "8"]
    environ = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == served.chat().json["choices"][0]["message"]["content"].strip()
