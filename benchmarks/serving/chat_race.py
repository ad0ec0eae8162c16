"""Chats at the same time, with a shared system prompt: our server and another one, in turn."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_edge.benchmarks.serving.load_client import LoadClient
from gemma_edge.benchmarks.serving.load_mix import CHAT
from gemma_edge.runtime.errors import DeviceError

CHATS, TURNS = 8, 3
SYSTEM = "You are a patient helper in a workshop. Answer in one sentence, name the tool, and say why. " * 6


@dataclass
class RaceFigures:
    """Of one server, a value a round: medians of the times to the first token, and whole rounds.

    Attributes:
        tokens: of all answers of a round; `total_s` compares servers only if these are alike.
    """

    ttft_ms: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def race(ports: Mapping[str, int], *, rounds: int, tokens: int) -> dict[str, RaceFigures]:
    """Runs `CHATS` chats of `TURNS` turns against each server, server by server in each round.

    Args:
        ports: on loopback, by the server's name; each speaks OpenAI's chat API.
        tokens: most of an answer.

    Raises:
        DeviceError: a server does not answer.
    """
    figures = {name: RaceFigures() for name in ports}

    async def rounds_in_turn() -> None:
        for number in range(-1, rounds):  # the first warms up
            for name, port in ports.items():
                await _round(port, number, tokens, figures[name])

    try:
        asyncio.run(rounds_in_turn())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DeviceError(f"a server does not answer: {error!r}") from None
    return figures


async def _round(port: int, number: int, tokens: int, figures: RaceFigures) -> None:
    firsts: list[float] = []
    counts: list[int] = []

    async def chat(index: int) -> None:
        # A round has a system prompt of its own, which its chats share.
        messages: list[dict[str, Any]] = [{"role": "system", "content": f"Round {number}. {SYSTEM}"}]
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"Question {index}.{turn}: which tool, and why?"})
            body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
            body["stream_options"] = {"include_usage": True}
            client = LoadClient(port)  # some servers close a connection between two turns
            response = await client.ask(CHAT, json.dumps(body).encode())
            client.close()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.body}")
            text = "".join(
                choice["delta"].get("content") or ""
                for event in response.body
                for choice in event.get("choices", ())
            )
            messages.append({"role": "assistant", "content": text or "."})
            firsts.append(response.first_s or response.seconds)
            counts.append(response.body[-1]["usage"]["completion_tokens"])

    started = time.perf_counter()
    await asyncio.gather(*map(chat, range(CHATS)))
    if number >= 0:
        figures.total_s.append(time.perf_counter() - started)
        figures.ttft_ms.append(1000 * statistics.median(firsts))
        figures.tokens.append(sum(counts))


def race_lines(figures: Mapping[str, RaceFigures]) -> Iterator[str]:
    """For people."""
    for name, found in figures.items():
        ttft, total = statistics.median(found.ttft_ms), statistics.median(found.total_s)
        tokens = statistics.median(found.tokens)
        yield f"| {name} | first token {ttft:.0f} ms | {CHATS} chats {total:.2f} s | {tokens:,.0f} tokens |"
