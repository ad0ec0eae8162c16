"""`gemma-edge serve` as a process on loopback, and plain HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.processes import PATIENCE_S, wait_for

URL = re.compile(r"http://[^/ ]+:(\d+)/ answers")
JSON = {"Content-Type": "application/json"}


LONG = "Count from one to one thousand, slowly, and never stop:"


def endless(**fields: Any) -> dict[str, Any]:
    """A completion whose answer has `max_tokens`, 400 unless told: no token ends it."""
    never_end = {"1": -100, "106": -100}
    return {"prompt": LONG, "max_tokens": 400, "temperature": 0, "logit_bias": never_end, **fields}


# `gemma-edge serve` that a test can slow down, after what else the test changes in it.
_CHANGED = """
import os, sys, time
from gemma_edge.cli.main import main
from gemma_edge.runtime.generate import TokenGenerator

brake, feed = sys.argv.pop(1), TokenGenerator.feed
exec(sys.argv.pop(1))

def seconds():
    try:
        return float(open(brake).read())
    except FileNotFoundError:  # let go just now
        return 0

def feed_slowly(self, ids):
    until = None
    while os.path.exists(brake):
        until = until or time.monotonic() + seconds()
        if time.monotonic() >= until:
            break
        time.sleep(0.005)
    return feed(self, ids)

TokenGenerator.feed = feed_slowly
sys.exit(main(sys.argv[1:]))
"""
KEEPALIVE_AT_ONCE = """
from dataclasses import replace
import gemma_edge.cli.serve as verb
made = verb._options
verb._options = lambda args: replace(made(args), keepalive_s=0.01)
"""


@dataclass
class Reply:
    """A response, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, comments and [DONE] left out."""
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def code(self) -> str | None:
        """The code of an error."""
        return self.json["error"]["code"]


@dataclass
class ServerProcess:
    """A server that runs, and what it wrote on stderr so far."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    brake: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request; a body that is no bytes is sent as JSON."""
        connection = self.connect()
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {} if body is None or isinstance(body, bytes) else JSON
            connection.request(method, path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def chat(self, text: str = "What is 2 + 3?", **fields: Any) -> Reply:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.ask("POST", "/v1/chat/completions", body)

    def send(self, data: bytes, *, wait: float = PATIENCE_S) -> bytes:
        """Raw bytes; what comes back until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as made:
            with contextlib.suppress(ConnectionError):
                made.sendall(data)
            received = bytearray()
            with contextlib.suppress(ConnectionError):
                while block := made.recv(65_536):
                    received += block
            return bytes(received)

    @contextlib.contextmanager
    def braked(self, token_s: float = 0.1) -> Iterator[None]:
        """Every token after an answer's first takes so long: an `endless` one does not end by itself."""
        assert self.brake is not None, "serving(brakes=True)"
        written = self.brake.with_name("written")
        written.write_text(str(token_s))
        written.replace(self.brake)
        try:
            yield
        finally:
            self.brake.unlink()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait_for_log(self, text: str) -> None:
        wait_for(lambda: any(text in line for line in self.log), f"the log never said {text!r}: {self.log}")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def anonymous_memory(self) -> int:
        """RssAnon in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


@contextlib.contextmanager
def serving(
    *arguments: str | Path, env: dict[str, str] | None = None, brakes: bool = False, change: str = ""
) -> Iterator[ServerProcess]:
    """A server with these arguments, listening; ended by SIGTERM.

    Args:
        brakes: it has `braked`.
        change: then, Python that runs before the server.
    """
    words = ["serve", *map(str, arguments), "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        brake = Path(folder) / "brake"
        how = ["-c", _CHANGED, str(brake), change] if brakes else ["-m", "gemma_edge.cli.main"]
        with started([sys.executable, *how, *words], env) as server:
            server.brake = brake if brakes else None
            yield server


@contextlib.contextmanager
def started(
    command: Sequence[str], env: dict[str, str] | None = None, **options: Any
) -> Iterator[ServerProcess]:
    """A server from any command that says where it listens."""
    environ = {**os.environ, **(env or {})}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ, **options
    )
    server = ServerProcess(process)
    reader = threading.Thread(target=_read, args=(server,))
    reader.start()
    try:
        wait_for(lambda: server.port or process.poll() is not None, "the server never listened")
        assert server.port, f"the server ended: {server.log}"
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()
            reader.join()


def _read(server: ServerProcess) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line)
        if found := URL.search(line):
            server.port = int(found[1])
    server.process.stderr.close()
