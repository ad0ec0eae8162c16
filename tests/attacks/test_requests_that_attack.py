"""Requests of strangers, of other sites' pages and of broken clients: none of them reaches the engine."""

from __future__ import annotations

import base64
import contextlib
import hmac
import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.runtime.errors import ConfigError, UsageError
from gemma_edge.runtime.server.gate import COOKIE, host_of
from gemma_edge.runtime.server.keyring import Key, Keyring, parse_rate, read_keys
from gemma_edge.runtime.server.rate_limit import SlidingWindow
from gemma_edge.runtime.server.server_options import Rate
from support.http_server import ServerProcess, serving, started
from support.processes import PATIENCE_S, wait_for

CHAT = "/v1/chat/completions"
KEY = "0123456789abcdef-key"
ROUTES = [
    *(("POST", path) for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/audio/transcriptions")),
    *(
        ("GET", path)
        for path in ("/", "/app.js", "/page.json", "/v1/models", "/health", "/ready", "/metrics")
    ),
    ("GET", "/nothing"),
    ("POST", "/logout"),
]


@pytest.fixture(scope="module")
def guarded(pocket_bundles: dict[str, Path]) -> Iterator[ServerProcess]:
    """A server with small limits. No request of these tests may reach the engine."""
    with serving(pocket_bundles["onnx"], "--max-body", "200KiB") as server:
        yield server
        metrics = server.get("/metrics").text
        assert "gemma_edge_time_to_first_token_seconds_count 0.0" in metrics
        assert 'gemma_edge_tokens_total{kind="prompt"}' not in metrics
        assert server.get("/health").json["status"] == "healthy"


@pytest.fixture(scope="module")
def locked(pocket_bundles: dict[str, Path]) -> Iterator[ServerProcess]:
    """A server with a key."""
    with serving(pocket_bundles["onnx"], "--host", "0.0.0.0", env={"GEMMA_EDGE_API_KEY": KEY}) as server:
        yield server


def message(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


# Other sites and strangers. -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "a:b", "[::1", "localhost:x"]
)
def test_a_name_that_leads_here_is_not_ours(guarded: ServerProcess, host: str) -> None:
    """DNS rebinding."""
    request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert guarded.send(request.encode()).split(b" ")[1] in (b"403", b"400")


def test_two_hosts_are_none(guarded: ServerProcess) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert guarded.send(request).split(b" ")[1] in (b"403", b"400")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://["]
)
def test_a_page_of_another_site_stays_out(guarded: ServerProcess, origin: str) -> None:
    reply = guarded.ask("POST", CHAT, message("x"), {"Origin": origin})
    assert reply.status == 403 and "access-control-allow-origin" not in reply.headers
    asked = guarded.ask("OPTIONS", CHAT, None, {"Origin": origin, "Access-Control-Request-Method": "POST"})
    assert asked.status == 403


def test_cors_is_for_named_origins(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], "--cors", "https://app.example") as server:
        wanted = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        asked = server.ask("OPTIONS", CHAT, None, wanted)
        assert asked.status == 204 and asked.headers["access-control-allow-origin"] == "https://app.example"
        reply = server.ask("POST", CHAT, {"n": 2}, {"Origin": "https://app.example"})
        assert reply.status == 400 and reply.headers["access-control-allow-origin"] == "https://app.example"
        assert server.ask("POST", CHAT, {}, {"Origin": "https://b.example"}).status == 403


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_key(locked: ServerProcess, method: str, path: str) -> None:
    body = {} if method == "POST" else None
    assert locked.ask(method, path, body).status == 401
    wrong = locked.ask(method, path, body, {"Authorization": f"Bearer {KEY}x"})
    assert wrong.status in (401, 429)
    right = locked.ask(method, path, body, {"Authorization": f"Bearer {KEY}"})
    assert right.status not in (401, 403)


def test_an_address_that_others_reach_needs_a_key(pocket_bundles: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "gemma_edge.cli.main", "serve", str(pocket_bundles["onnx"]), "--host"]
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        argv = [*command, host]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == 2 and "--api-key" in done.stderr


def test_wrong_keys_run_out(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], "--api-key", KEY) as server:
        statuses = [server.get("/health", Authorization=f"Bearer {n:020}").status for n in range(40)]
        assert statuses.count(401) == 30 and statuses[-1] == 429
        assert server.get("/health", Authorization=f"Bearer {KEY}").status == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, whichever is presented, and by the function that is made for it."""
    ring = Keyring([Key(name, name * 16) for name in "abc"])
    calls = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: calls.append((len(a), len(b))) or real(a, b))
    for presented in (b"a" * 16, b"c" * 16, b"", b"x" * 100_000):
        calls.clear()
        ring.find(presented)
        assert calls == [(32, 32)] * 3


def test_the_page_gets_a_cookie_for_a_key_and_no_forged_one_counts(locked: ServerProcess) -> None:
    form = locked.get("/", Accept="text/html")
    assert form.status == 401 and "<form" in form.text and "script" not in form.text
    assert "style-src 'sha256-" in form.headers["content-security-policy"]
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert locked.ask("POST", "/login", b"key=wrong", kind).status == 401
    entered = locked.ask("POST", "/login", f"key={KEY}".encode(), kind)
    cookie = entered.headers["set-cookie"]
    assert (
        entered.status == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
    )
    value = re.search(f"{COOKIE}=([^;]+)", cookie)[1]  # type: ignore[index]
    assert locked.get("/", Cookie=f"{COOKIE}={value}").status == 200
    name, expires, seal = value.rsplit(".", 2)
    for forged in (
        f"{name}.{int(expires) + 1}.{seal}",
        f"{name}.{expires}.",
        f"..{seal}",
        f"x.{expires}.{seal}",
        "é",
    ):
        assert locked.get("/", Cookie=f"{COOKIE}={forged}".encode().decode("latin-1")).status in (401, 429)
    old = Keyring([Key("default", KEY)])
    assert (
        old.find_cookie(value) is not None and Keyring([Key("default", KEY + "x")]).find_cookie(value) is None
    )


def test_a_cookie_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring([Key("me", KEY)])
    cookie = ring.cookie(ring.find(KEY.encode()) or Key("", ""))
    assert ring.find_cookie(cookie)
    monkeypatch.setattr(time, "time", lambda: 10.0**11)
    assert ring.find_cookie(cookie) is None


def test_named_keys_have_their_own_limits(pocket_bundles: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[a]\nkey = "{KEY}a"\nrate = "2/h"\nmax_tokens = 2\n[b]\nkey = "{KEY}b"\n')
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    with serving(pocket_bundles["onnx"], "--api-key-file", file) as server:
        a, b = ({"Authorization": f"Bearer {KEY}{name}"} for name in "ab")
        short = server.ask("POST", CHAT, message("x"), a)
        assert short.json["usage"]["completion_tokens"] <= 2
        assert server.ask("POST", CHAT, message("x", max_tokens=3), a).json["error"]["param"] == "max_tokens"
        third = server.ask("POST", CHAT, message("x"), a)
        assert third.status == 429 and int(third.headers["retry-after"]) > 3000
        assert server.ask("GET", "/health", None, a).status == 200
        assert server.ask("POST", CHAT, message("x", n=2), b).status == 400


@pytest.mark.parametrize(
    "text",
    ["", "x = 1", "[a]", '[a]\nkey = "short"', '[a]\nkey = 5', f'[a]\nkey = "{KEY}"\nother = 1',
     f'[a]\nkey = "{KEY}"\nrate = "5"', f'[a]\nkey = "{KEY}"\nmax_tokens = 0', f'["a b"]\nkey = "{KEY}"',
     f'[a]\nkey = "{KEY}"\n[b]\nkey = "{KEY}"'],
)  # fmt: skip
def test_a_bad_file_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError):
        read_keys(file)


def test_a_client_that_asks_too_often_waits() -> None:
    now = 0.0
    window, rate = SlidingWindow(lambda: now), Rate(3, 10)
    assert [window.wait("a", rate) for _ in range(3)] == [0, 0, 0]
    assert window.wait("a", rate) == 10 and window.wait("b", rate) == 0
    now = 9.9
    assert window.wait("a", rate) > 0
    now = 10.1
    assert window.wait("a", rate) == 0
    for text in ("", "5", "0/m", "5/y", "5/0s", "-1/s"):
        with pytest.raises(UsageError):
            parse_rate(text)


def test_names_of_hosts() -> None:
    expected = {
        "localhost:80": "localhost",
        "[::1]:8": "::1",
        "A.B.": "a.b",
        "a:b": None,
        "[::1": None,
        "": None,
    }
    assert {header: host_of(header) for header in expected} == expected


# Bodies. ------------------------------------------------------------------------------------------------


def test_bodies_are_bounded_while_they_are_read(guarded: ServerProcess) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    stated = guarded.send(f"{head}Content-Length: 999999999\r\n\r\n".encode())
    assert b" 413 " in stated[:20] and b"connection: close" in stated.lower()
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    assert b" 413 " in guarded.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 8)[:20]


def test_a_slow_client_is_left(pocket_bundles: dict[str, Path]) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    script = (
        "from dataclasses import replace; import gemma_edge.cli.serve as verb;"
        "from gemma_edge.cli.main import main; made = verb._limits;"
        "verb._limits = lambda args: replace(made(args), body_seconds=0.3, header_seconds={});"
        f"main(['serve', {str(pocket_bundles['onnx'])!r}, '--port', '0'])"
    )
    # Headers have their time, so that the body is what is late; then they are late.
    with started([sys.executable, "-c", script.format(60)]) as server:
        assert b" 408 " in server.send(f"{head}Content-Length: 10\r\n\r\n{{".encode())[:20]
    with started([sys.executable, "-c", script.format(0.3)]) as server:
        assert server.send(b"GET / HTTP/1.1\r\nHost: loc") == b""


def test_large_headers_are_refused(guarded: ServerProcess) -> None:
    request = (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"
    )
    assert guarded.send(request).split(b" ")[1] in (b"400", b"431")


DEEP = b"[" * 100_000
BODIES = {
    "no JSON": b"{",
    "not UTF-8": b'{"messages": "\xff"}',
    "no object": b"[]",
    "too deep": b'{"messages": ' + DEEP,
    "deep and closed": b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}",
    "a number of 10,000 digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"temperature": NaN}',
    "infinite": b'{"temperature": 1e999}',
    "a name twice": b'{"n": 1, "n": 2}',
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "too many values": b'{"x": [' + b"[]," * 60_000 + b"[]]}",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(guarded: ServerProcess, name: str) -> None:
    reply = guarded.ask("POST", CHAT, BODIES[name], {"Content-Type": "application/json"})
    assert reply.status == 400 and "\n" not in reply.json["error"]["message"]


def picture(width: int, height: int) -> str:
    image = pytest.importorskip("PIL.Image").new("1", (width, height))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def image(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [{"role": "user", "content": "x"}] * 51}, "messages"),
    "no messages": ({"messages": []}, "messages"),
    "parts": (message([{"type": "text", "text": "x"}] * 33), "messages[0].content"),
    "text": (message("x" * 100_000), "messages[0].content"),
    "tokens": (message("two " * 3_000), ""),
    "pixels": (message(image("@pixels")), "messages[0].content[0].image_url.url"),
    "no picture": (message(image("data:image/png;base64,AAAA")), "messages[0].content[0].image_url.url"),
    "no base64": (message(image("data:image/png;base64,@@")), "messages[0].content[0].image_url.url"),
    "a file": (message(image("file:///etc/passwd")), "messages[0].content[0].image_url.url"),
    "a path": (message([{"type": "image", "path": "/etc/passwd"}]), "messages[0].content[0].type"),
    "tools": (message("x", tools=[TOOL] * 33), "tools"),
    "schema": (message("x", tools=[{**TOOL, "function": {"name": "f", "parameters": deep_schema(20)}}]), ""),
    "role": ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
    "type": (message(5), "messages[0].content"),
    "flag": (message("x", stream="yes"), "stream"),
    "n": (message("x", n=2), "n"),
    "audio": (message("x", audio={"voice": "a"}), "audio"),
    "user": (message("x", user=5), "user"),
    "unknown": (message("x", bogus=1), "bogus"),
    "speculate": (message("x", speculate="yes"), "speculate"),
    "prediction": (message("x", prediction={"type": "file", "content": "y"}), "prediction.type"),
    "no prediction": (message("x", prediction={"type": "content"}), "prediction.content"),
    "long prediction": (
        message("x", prediction={"type": "content", "content": "y" * 100_000}), "prediction.content"
    ),
    "prediction of a picture": (
        message("x", prediction={"type": "content", "content": image(picture(8, 8))}), "prediction.content"
    ),
    "more of a prediction": (
        message("x", prediction={"type": "content", "content": "y", "z": 1}), "prediction.z"
    ),
    "of a message": ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    "stops": (message("x", stop=["a"] * 5), "stop"),
    "bias": (message("x", logit_bias={"5": 101}), "logit_bias.5"),
    "unknown token": (message("x", logit_bias={"99999999": 1}), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_beyond_a_limit(guarded: ServerProcess, name: str) -> None:
    body, param = REQUESTS[name]
    if name == "pixels":
        body = message(image(picture(8192, 4096)))
    reply = guarded.ask("POST", CHAT, body)
    assert reply.status == 400, reply.text
    assert (reply.json["error"]["param"] or "") == param


def test_nothing_is_fetched(guarded: ServerProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
        for body in (
            message(image(url)),
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
        ):
            path = "/v1/responses" if "input" in body else CHAT
            assert guarded.ask("POST", path, body).status == 400
        listening.settimeout(0.3)
        with pytest.raises(TimeoutError):
            listening.accept()


def test_a_recording_that_is_too_long(pocket_bundles: dict[str, Path]) -> None:
    from test_serve import multipart, recording

    with serving(pocket_bundles["onnx"], "--max-audio", "2s") as server:
        body, headers = multipart(recording(3.0))
        reply = server.ask("POST", "/v1/audio/transcriptions", body, headers)
        assert reply.status == 400 and reply.code == "audio_too_long"
        assert "time_to_first_token_seconds_count 0.0" in server.get("/metrics").text


PART = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
FIELD = b'--cut\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
FORMS = {
    "no boundary": (b"x", "multipart/form-data"),
    "cut off": (PART + b"x", "multipart/form-data; boundary=cut"),
    "many fields": (FIELD * 2000 + b"--cut--", "multipart/form-data; boundary=cut"),
    "JSON": (b"{}", "application/json"),
    "large": (PART + b"x" * 300_000, "multipart/form-data; boundary=cut"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_none(guarded: ServerProcess, name: str) -> None:
    body, kind = FORMS[name]
    reply = guarded.ask("POST", "/v1/audio/transcriptions", body, {"Content-Type": kind})
    assert reply.status in (400, 413, 415), reply.text


@pytest.mark.parametrize(
    "path", ["/../SECURITY.md", "/%2e%2e/page_files.py", "/page_files.py", "/..%2fgate.py", "/.htaccess"]
)
def test_files_beside_the_page_stay_where_they_are(guarded: ServerProcess, path: str) -> None:
    assert guarded.get(path).status == 404


def test_the_page_may_load_nothing_else(guarded: ServerProcess) -> None:
    page = guarded.get("/")
    policy = page.headers["content-security-policy"]
    assert page.status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in policy and "*" not in policy and page.headers["x-content-type-options"] == "nosniff"


def test_methods_and_types(guarded: ServerProcess) -> None:
    assert guarded.get(CHAT).status == 405
    assert guarded.ask("POST", CHAT, b"{}", {"Content-Type": "text/plain"}).status == 415
    assert guarded.ask("DELETE", "/v1/models/pocket").status == 405


def test_descriptors_and_tasks_do_not_pile_up(guarded: ServerProcess) -> None:
    guarded.get("/health")
    before = guarded.descriptors()
    for _ in range(50):
        with contextlib.closing(socket.create_connection(("127.0.0.1", guarded.port))) as made:
            made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    wait_for(lambda: guarded.descriptors() <= before + 1, "connections were left open")
    assert json.loads(guarded.get("/health").body)["queue"]["running"] == 0
