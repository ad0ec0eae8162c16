"""`bench_serve`: what the server adds to the library's times, and whether it stands a load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gemma_edge.benchmarks.serving.chat_race import CHATS, RaceFigures, race
from gemma_edge.benchmarks.serving.load_client import LoadClient
from gemma_edge.benchmarks.serving.load_mix import CHAT, KnownAnswer, known_answers, send_one
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.host.process_memory import resident_memory
from gemma_edge.runtime.model import Model

KNOWN = 48  # different requests of a load
SETTLED = 500  # requests between two looks at memory; after the first it should not grow
TIMES = ("library_ttft_ms", "serve_ttft_ms", "library_token_ms", "serve_token_ms")  # of `ServeFigures`
START_S = 300.0
SNAPSHOTS = "1GiB"  # of a race, if they take so much: the other server has a KV cache for each chat
LISTENS = re.compile(r"http://127\.0\.0\.1:(\d+)/ answers")


@dataclass
class ServeFigures:
    """What `bench_serve` found.

    Attributes:
        library_ttft_ms, serve_ttft_ms: medians of the same prompts, asked in turn.
        library_token_ms, serve_token_ms: from the first to the last piece of text, for each token but the
            first; medians of answers.
        times_ms: the samples of these four, by their names.
        sent, wrong: requests of the load by how they were asked; those that got another response.
        lost: requests without a response.
        rss_anon: bytes of the server, after every `SETTLED` requests: caches fill up first.
        descriptors: open ones, then, when no client was connected.
    """

    library_ttft_ms: float = 0.0
    serve_ttft_ms: float = 0.0
    library_token_ms: float = 0.0
    serve_token_ms: float = 0.0
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    seconds: float = 0.0
    rss_anon: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of RssAnon since the first look, as a fraction."""
        return self.rss_anon[-1] / self.rss_anon[0] - 1 if self.rss_anon else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "growth": self.growth}

    def lines(self) -> Iterator[str]:
        """For people."""
        added = self.serve_ttft_ms - self.library_ttft_ms
        yield f"| first token | library {self.library_ttft_ms:.2f} ms | server + {added:.2f} ms |"
        extra = self.serve_token_ms - self.library_token_ms
        share = extra / self.library_token_ms if self.library_token_ms else 0.0
        yield f"| a token | library {self.library_token_ms:.3f} ms | server {extra:+.3f} ms ({share:+.1%}) |"
        for kind, count in sorted(self.sent.items()):
            yield f"| {kind} | {count:,} requests | {self.wrong.get(kind, 0)} wrong |"
        yield f"| all | {sum(self.sent.values()):,} in {self.seconds:.0f} s | {self.lost} lost |"
        if self.rss_anon:
            half = self.rss_anon[len(self.rss_anon) // 2]
            late = self.rss_anon[-1] / half - 1
            yield f"| RssAnon | {self.rss_anon[0]:,} bytes | {self.growth:+.2%}, second half {late:+.2%} |"
            yield f"| descriptors | {self.descriptors[0]} | {self.descriptors[-1]} |"


def bench_serve(
    bundle: Path,
    *,
    requests: int = 10_000,
    clients: int = 32,
    pairs: int = 40,
    tokens: int = 64,
    threads: int | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> ServeFigures:
    """Starts the server on loopback, compares it with the library, and puts it under load.

    Args:
        requests: of the load; 0 for none.
        clients: of the load, each with a connection.
        pairs: answers by the library and by the server, in turn; 0 for none.
        tokens: of each of these answers.

    Raises:
        DeviceError: the server does not start, or ends.
    """
    model = Model.load(bundle, threads=threads)
    figures = ServeFigures()
    with _server(bundle, threads, clients) as (process, port):
        if pairs:
            log(f"{pairs} answers each, in turn")
            _compare(model, port, pairs, tokens, figures)
        if requests:
            log("the library's answers")
            known = known_answers(model, KNOWN)
            model.close()
            log(f"{requests:,} requests of {clients} clients")
            asyncio.run(_load(process.pid, port, known, requests, clients, seed, figures, log))
        if process.poll() is not None:
            raise DeviceError(f"the server ended with {process.returncode}")
    return figures


def bench_race(
    bundle: Path,
    peer: int,
    *,
    peer_name: str | None = None,
    rounds: int = 5,
    tokens: int = 64,
    threads: int | None = None,
) -> dict[str, RaceFigures]:
    """Our server and the one on port `peer`, in turn; see `race`."""
    with _server(bundle, threads, CHATS, "--snapshots", SNAPSHOTS) as (_, port):
        ports = {"gemma-edge": port, peer_name or f"port {peer}": peer}
        return race(ports, rounds=rounds, tokens=tokens)


@contextlib.contextmanager
def _server(
    bundle: Path, threads: int | None, clients: int, *options: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "gemma_edge.cli.main", "serve", str(bundle), "--port", "0"]
    command += ["--queue", str(2 * clients)]  # none is turned away: each has one request
    command += ["--threads", str(threads)] if threads else []
    command += options
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    port = threading.Event()
    reader = threading.Thread(target=_read, args=(process, lines, port), daemon=True)
    reader.start()
    try:
        if not port.wait(START_S) or process.poll() is not None:
            raise DeviceError(
                f"the server does not start: {lines[-1].strip() if lines else 'no reason given'}"
            )
        yield process, int(LISTENS.search(lines[-1])[1])  # type: ignore[index]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        reader.join()


def _read(process: subprocess.Popen[str], lines: list[str], ready: threading.Event) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if not ready.is_set():
            lines.append(line)
        if LISTENS.search(line):
            ready.set()
    ready.set()


def _compare(model: Model, port: int, pairs: int, tokens: int, figures: ServeFigures) -> None:
    ends: dict[int | str, float] = dict.fromkeys(sorted(model.end_ids), -100.0)
    by_name = {str(token): bias for token, bias in ends.items()}
    times: dict[str, list[float]] = {name: [] for name in TIMES}

    async def serve(body: bytes) -> None:
        response = await client.ask(CHAT, body)
        usage = response.body[-1]["usage"]
        first = response.first_s or 0.0
        add("serve", first, (response.last_s - first) / (usage["completion_tokens"] - 1))

    def add(who: str, first_s: float, token_s: float) -> None:
        times[f"{who}_ttft_ms"].append(1000 * first_s)
        times[f"{who}_token_ms"].append(1000 * token_s)

    async def alternate() -> None:
        for number in range(-2, pairs):  # the first two warm up
            # Prompts that begin in another way each time: nothing of them is in a cache.
            messages = [{"role": "user", "content": f"{number} {number * 7} is a number. " * 8}]
            options: dict[str, Any] = {"max_tokens": tokens, "temperature": 0}
            started, first, last = time.perf_counter(), 0.0, 0.0
            stream = model.generate(
                messages, stream=True, logit_bias=ends, max_tokens=tokens, temperature=0.0
            )
            for _ in stream:
                last = time.perf_counter() - started
                first = first or last
            add("library", first, (last - first) / (stream.completion.usage.completion_tokens - 1))
            extra = {"stream": True, "stream_options": {"include_usage": True}, "logit_bias": by_name}
            await serve(json.dumps({"messages": messages, **options, **extra}).encode())

    client = LoadClient(port)
    asyncio.run(alternate())
    figures.times_ms = {name: values[2:] for name, values in times.items()}
    for name, values in figures.times_ms.items():
        setattr(figures, name, statistics.median(values))


async def _load(
    pid: int,
    port: int,
    known: Sequence[KnownAnswer],
    requests: int,
    clients: int,
    seed: int,
    figures: ServeFigures,
    log: Callable[[str], None],
) -> None:
    sent: Counter[str] = Counter()
    wrong: Counter[str] = Counter()

    async def one_client(number: int, count: int) -> None:
        client, rng = LoadClient(port), Random(f"{seed} {number} {sum(sent.values())}")
        for _ in range(count):
            try:
                kind, right = await send_one(client, known, rng)
            except (OSError, EOFError, ValueError, IndexError) as error:
                client.close()
                figures.lost += 1
                log(f"lost: {error!r}")
                continue
            sent[kind] += 1
            wrong[kind] += not right
        client.close()

    async def part(count: int) -> None:
        shares = [count // clients + (n < count % clients) for n in range(clients)]
        await asyncio.gather(*(one_client(n, share) for n, share in enumerate(shares)))
        await asyncio.sleep(1)  # the server notices that they left

    started = time.perf_counter()
    for done in range(0, requests, SETTLED):
        await part(min(SETTLED, requests - done))
        figures.rss_anon.append(resident_memory(pid).anon)
        figures.descriptors.append(_descriptors(pid))
    figures.seconds = time.perf_counter() - started
    figures.sent, figures.wrong = dict(sent), {kind: count for kind, count in wrong.items() if count}


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
