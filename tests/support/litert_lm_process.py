"""LiteRT-LM, Google's runtime, in a process of its own: it aborts where others raise, and it logs a lot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import json, os, sys
path, prompt, count, cache = sys.argv[1:]
from litert_lm import Engine, interfaces
engine = Engine(path, cache_dir=cache, enable_benchmark=True)
greedy = interfaces.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
session = engine.create_session(
    apply_prompt_template=False, sampler_config=greedy, max_output_tokens=int(count)
)
session.run_prefill([prompt])
pieces = [text for response in session.run_decode_async() for text in response.texts]
info = session.get_benchmark_info()
chat = engine.create_conversation(sampler_config=greedy, max_output_tokens=1)
chat.send_message(prompt)
answer = {
    "pieces": pieces,
    "prompt_tokens": info.last_prefill_token_count,
    "tokens": info.last_decode_token_count,
    "chat_tokens": chat.get_benchmark_info().last_prefill_token_count,
    "start": engine.bos_token_id,
    "stop": engine.eos_token_ids,
}
os.write(1, ("ANSWER" + json.dumps(answer) + "\\n").encode())
"""

CHAT = """
import json, os, sys
path, parts, count, cache = sys.argv[1:]
from litert_lm import Engine, interfaces
cpu = interfaces.Backend.CPU()
kinds = {part["type"] for part in json.loads(parts)}
engine = Engine(
    path,
    cache_dir=cache,
    enable_benchmark=True,
    vision_backend=cpu if "image" in kinds else None,
    audio_backend=cpu if "audio" in kinds else None,
)
greedy = interfaces.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
chat = engine.create_conversation(sampler_config=greedy, max_output_tokens=int(count))
said = chat.send_message({"role": "user", "content": json.loads(parts)})
answer = {"text": str(said), "prompt_tokens": chat.get_benchmark_info().last_prefill_token_count}
os.write(1, ("ANSWER" + json.dumps(answer) + "\\n").encode())
"""


TOOLS = """
import json, os, sys
path, tools, messages, cache = sys.argv[1:]
from litert_lm import Engine, ModelInfo, interfaces

class Described(interfaces.Tool):
    def __init__(self, description):
        self.description = description

    def get_tool_description(self):
        return self.description

    def execute(self, arguments):
        return None

with ModelInfo(path) as info:
    supported = info.llm.supports_function_calling()
engine = Engine(path, cache_dir=cache)
greedy = interfaces.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
*before, last = json.loads(messages)
chat = engine.create_conversation(
    tools=[Described(tool) for tool in json.loads(tools)],
    messages=before,
    automatic_tool_calling=False,
    sampler_config=greedy,
    max_output_tokens=64,
)
prompt = chat.render_message_to_string(last)
said = chat.send_message(last)
calls = [[call.name, call.arguments] for call in said.tool_calls]
answer = {"prompt": prompt, "text": str(said), "calls": calls, "supported": supported}
os.write(1, ("ANSWER" + json.dumps(answer) + "\\n").encode())
"""


def run_tools(path: Path, tools: list[Any], messages: list[Any], cache: Path) -> dict[str, Any]:
    """What LiteRT-LM's tool API makes of messages and of the greedy answer to them.

    Returns:
        "prompt" (rendered), "text", "calls" ([name, arguments] of each), and "supported", what the file says.
    """
    return _answer([TOOLS, str(path), json.dumps(tools), json.dumps(messages), str(cache)])


def run_greedy(path: Path, prompt: str, count: int, cache: Path) -> dict[str, object]:
    """Greedy continuation of `prompt`, after a bos, by `count` tokens.

    Returns:
        "pieces" (text of each step), "tokens", "prompt_tokens", "start", "stop", and "chat_tokens", the
        tokens of the prompt as one user turn.
    """
    return _answer([CHILD, str(path), prompt, str(count), str(cache)])


def run_chat(path: Path, parts: list[dict[str, str]], count: int, cache: Path) -> dict[str, object]:
    """The greedy answer, of `count` tokens, to one user turn of parts as transformers has them.

    Returns:
        "text" and "prompt_tokens".
    """
    return _answer([CHAT, str(path), json.dumps(parts), str(count), str(cache)])


def _answer(arguments: list[str]) -> dict[str, object]:
    argv = [sys.executable, "-c", *arguments]
    done = subprocess.run(argv, capture_output=True, timeout=600)
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith("ANSWER"):
            answer: dict[str, object] = json.loads(line.removeprefix("ANSWER"))
            return answer
    raise AssertionError(
        f"LiteRT-LM ended with {done.returncode}: {done.stderr[-2000:].decode(errors='replace')}"
    )
