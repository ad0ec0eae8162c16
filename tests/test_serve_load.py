"""`gemma-edge serve` with many clients: queue, leaving, deadlines, its end, and new bundles."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_edge.runtime.server.model_pool import ServedModel
from gemma_edge.runtime.server.server_health import SERVER_BYTES
from support.http_server import KEEPALIVE_AT_ONCE, ServerProcess, endless, serving, started
from support.processes import PATIENCE_S, wait_for

COMPLETIONS = "/v1/completions"
HEAP = ["rw-p", "00000000", "00:00", "0"]  # of /proc/PID/maps, behind the addresses


def open_stream(server: ServerProcess, **fields: Any) -> Iterator[bytes]:
    """The lines of a stream, as they come."""
    connection = server.connect()
    body = json.dumps(endless(stream=True, **fields)).encode()
    connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    with contextlib.closing(connection):
        yield from response


def running(server: ServerProcess) -> int:
    return int(server.get("/health").json["queue"]["running"])


def waiting(server: ServerProcess) -> int:
    return int(server.get("/health").json["queue"]["waiting"])


def test_a_full_queue_answers_429(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], "--queue", "0", brakes=True) as server:
        with server.braked():
            stream = open_stream(server)
            next(stream)
            reply = server.chat()
            assert reply.status == 429 and reply.code == "queue_full"
            assert int(reply.headers["retry-after"]) > 0
            assert server.chat(stream=True).status == 429
            stream.close()  # type: ignore[attr-defined]
            wait_for(lambda: not running(server), "the answer went on")
        assert server.chat().status == 200
        assert 'rejections_total{reason="queue_full"} 2.0' in server.get("/metrics").text


def test_an_answer_ends_when_its_client_leaves(served: ServerProcess) -> None:
    for stream in (True, False):
        connection = served.connect()
        body = json.dumps(endless(stream=stream)).encode()
        with served.braked():
            connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            if stream:
                connection.getresponse().readline()
            else:
                wait_for(lambda: running(served), "it never began")
            connection.close()
            wait_for(lambda: not running(served), "the answer went on")
    left = served.get("/metrics").text
    assert 'gemma_edge_requests_total{outcome="client_left",route="/v1/completions"}' in left


def test_answers_that_wait_share_one_heap(pocket_bundles: dict[str, Path]) -> None:
    """Their threads would have a heap each, whose free pages no other thread uses."""
    with serving(pocket_bundles["onnx"], brakes=True) as server, ThreadPoolExecutor(12) as pool:
        with server.braked(10):  # so long that their turns do not come
            stream = open_stream(server)
            next(stream)
            asked = [pool.submit(server.chat, max_tokens=1) for _ in range(12)]
            wait_for(lambda: waiting(server) == 12, "they do not wait")
            heaps = _heaps(server.process.pid)
        stream.close()  # type: ignore[attr-defined]
        assert {each.result().status for each in asked} == {200}
    assert heaps <= 3  # one; other mappings may begin at such an address by chance


def _heaps(pid: int) -> int:
    """glibc's heaps beside the main thread's: each begins at a multiple of 64 MiB."""
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    starts = [int(fields[0].partition("-")[0], 16) for fields in maps if fields[1:] == HEAP]
    return sum(start % (64 << 20) == 0 for start in starts)


def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(
    pocket_bundles: dict[str, Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving(pocket_bundles["onnx"], "--access-log", log, brakes=True) as server:
        with server.braked():
            stream = open_stream(server)
            next(stream)
            assert server.ask("POST", COMPLETIONS, endless(max_tokens=4)).status == 200
        assert b"data: [DONE]\n" in list(stream)
    ended = [json.loads(line)["completion_tokens"] for line in log.read_text().splitlines()]
    assert ended == [4, 400]


def test_many_streams_at_once_do_not_mix(served: ServerProcess) -> None:
    def ask(number: int) -> tuple[str, str]:
        options = {"seed": number % 4, "temperature": 1.0, "max_tokens": 12}
        whole = served.chat(f"What is {number % 4} + 3?", **options)
        stream = served.chat(f"What is {number % 4} + 3?", stream=True, **options)
        pieces = [c["delta"].get("content") or "" for e in stream.events for c in e["choices"]]
        return whole.json["choices"][0]["message"]["content"], "".join(pieces)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    for number, (whole, streamed) in enumerate(answers):
        assert whole == streamed == answers[number % 4][0]


def test_a_deadline_ends_an_answer(pocket_bundles: dict[str, Path]) -> None:
    with serving(
        pocket_bundles["onnx"], "--deadline", "0.05s", "--access-log", pocket_bundles["onnx"].parent / "log"
    ) as server:
        reply = server.ask("POST", COMPLETIONS, endless())
        assert reply.status in (200, 503)  # a part of the answer, or none at all
        if reply.status == 200:
            assert reply.json["choices"][0]["finish_reason"] == "length"
    line = json.loads((pocket_bundles["onnx"].parent / "log").read_text().splitlines()[-1])
    assert line["outcome"] in ("timeout", "error")


def test_a_stream_that_waits_gets_comments(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], brakes=True, change=KEEPALIVE_AT_ONCE) as server:
        with server.braked():
            first = open_stream(server)
            next(first)
            second = open_stream(server, max_tokens=1)
            assert next(second) == b": waiting\n"
        first.close()  # type: ignore[attr-defined]
        assert b"data: [DONE]\n" in list(second)


def test_sigterm_finishes_what_runs(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], brakes=True) as server:
        with server.braked():
            stream = open_stream(server)
            next(stream)
            server.signal(signal.SIGTERM)
            server.wait_for_log("ending")
            wait_for(lambda: not _accepts(server), "it still accepts connections")
        assert list(stream)[-2:] == [b"data: [DONE]\n", b"\n"]
        assert server.process.wait(PATIENCE_S) == 0


def test_a_request_that_was_on_its_way_at_sigterm_is_answered(pocket_bundles: dict[str, Path]) -> None:
    patient = "import gemma_edge.runtime.server.serving as serving; serving.GRACE_S = 60.0"
    with serving(pocket_bundles["onnx"], brakes=True, change=patient) as server:
        idle = server.connect()
        idle.connect()
        with server.braked():
            stream = open_stream(server)
            next(stream)
            server.signal(signal.SIGTERM)
            server.wait_for_log("ending")
            body = json.dumps(endless(max_tokens=2))
            idle.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        response = idle.getresponse()
        assert response.status == 200
        response.read()
        assert idle.sock is None or idle.sock.recv(1) == b""  # then the server closes the connection
        idle.close()
        assert b"data: [DONE]\n" in list(stream)


def test_the_drain_time_ends_what_runs_too_long(pocket_bundles: dict[str, Path]) -> None:
    with serving(pocket_bundles["onnx"], "--drain", "0.05s") as server:
        stream = open_stream(server, max_tokens=400)
        next(stream)
        server.signal(signal.SIGTERM)
        lines = list(stream)
        assert server.process.wait(PATIENCE_S) == 0
        ended = [line for line in lines if b"shutting_down" in line]
        assert ended or b"data: [DONE]\n" in lines


def _accepts(server: ServerProcess) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except OSError:
        return False
    return True


def test_sighup_takes_the_new_bundle_and_loses_no_request(
    pocket_bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(pocket_bundles["onnx"], tmp_path / "pocket")
    with serving(bundle) as server, ThreadPoolExecutor(8) as pool:
        stream = open_stream(server, max_tokens=100)
        next(stream)
        replies = [pool.submit(server.chat, f"What is {n} + 1?") for n in range(8)]
        server.signal(signal.SIGHUP)
        replies += [pool.submit(server.chat, f"What is {n} + 2?") for n in range(8)]
        assert b"data: [DONE]\n" in list(stream)
        assert [reply.result().status for reply in replies] == [200] * 16
        server.wait_for_log("reloaded")
        (bundle / "manifest.json").write_text("{}")
        server.signal(signal.SIGHUP)
        server.wait_for_log("not reloaded")
        assert server.chat().status == 200


def test_a_socket_unit_keeps_the_socket_between_two_servers(
    pocket_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """What a socket unit does: the socket stays open while one server ends and the next one begins."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    wrapper = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())};"
        "os.execv(sys.executable, [sys.executable, '-m', 'gemma_edge.cli.main', 'serve', sys.argv[2]])"
    )
    command = [sys.executable, "-c", wrapper, str(listening.fileno()), str(pocket_bundles["onnx"])]
    statuses = []

    def ask(number: int) -> int:
        probe.port = port
        return probe.chat(f"What is {number} + 1?").status

    with started(command, pass_fds=[listening.fileno()]) as probe, ThreadPoolExecutor(4) as pool:
        assert probe.port == port
        asked = [pool.submit(ask, n) for n in range(40)]
        wait_for(lambda: any(each.done() for each in asked), "no answer")
        probe.signal(signal.SIGTERM)
        probe.process.wait(PATIENCE_S)
        with started(command, pass_fds=[listening.fileno()]):
            statuses = [each.result() for each in asked]
    listening.close()
    assert statuses == [200] * 40


def test_several_models_share_one_budget(pocket_bundles: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(pocket_bundles["onnx"])
    shutil.copytree(pocket_bundles["tflite"], tmp_path / "three")
    with serving("--models", tmp_path, "--memory", "200MiB") as server:
        assert sorted(m["id"] for m in server.get("/v1/models").json["data"]) == ["one", "three", "two"]
        assert server.chat(model="one").status == 200
        ceiling = server.get("/health").json["memory"]["ceiling_bytes"]
        assert ceiling == SERVER_BYTES + ServedModel.of("one", tmp_path / "one").need  # not the budget
        for name in ("two", "three", "one"):
            assert server.chat(model=name).status == 200
        wait_for(lambda: "".join(server.log).count("loaded in") >= 4, "the log is not complete")
        log = "".join(server.log)
        assert log.count("released") >= 3 and log.count("loaded in") == 4
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.chat, model=name) for name in ("one", "two", "three") * 4]
            assert {each.result().status for each in asked} == {200}
    with serving("--models", tmp_path, "--memory", "1MiB") as server:
        assert server.chat().code == "model_too_large"


def test_degraded_health_and_alerts(pocket_bundles: dict[str, Path], tmp_path: Path) -> None:
    rules, told = tmp_path / "alerts.toml", tmp_path / "told"
    rules.write_text(
        f'window_s = 60\ncommand = ["/bin/sh", "-c", "touch {told}"]\n'
        "[thresholds]\np95_latency = 0.001\nrss_anon = '1TiB'\n"
    )
    with serving(pocket_bundles["onnx"], "--alerts", rules, "--degraded-after", "0.001s") as server:
        server.ask("POST", COMPLETIONS, endless(max_tokens=32))
        health = server.get("/health")
        assert health.status == 200 and health.json["status"] == "degraded"
        server.wait_for_log("alert: p95_latency is")
        wait_for(told.exists, "the command was never run")
        text = server.get("/metrics").text
        assert 'gemma_edge_alert{name="p95_latency"} 1.0' in text
        assert 'gemma_edge_alert{name="rss_anon"} 0.0' in text


def test_the_access_log_tells_all_but_the_text(pocket_bundles: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    with serving(pocket_bundles["onnx"], "--access-log", path) as server:
        server.chat("a very private question")
        server.chat("a very private question")
        server.ask("POST", COMPLETIONS, b"{")
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "private" not in text and path.stat().st_mode & 0o077 == 0
    assert [line["outcome"] for line in lines] == ["ok", "ok", "refused"]
    assert lines[0]["prompt_sha256"] == lines[1]["prompt_sha256"]
    assert lines[0]["completion_tokens"] > 0 and lines[0]["ttft_s"] > 0 and lines[0]["rss_anon_bytes"] > 0


def test_two_chats_keep_their_caches(served: ServerProcess) -> None:
    """The second turn of each chat finds its first one, though the other chat came in between."""
    first = {
        name: f"{name}: tell me about the numbers two and three, please, and take your time." for name in "AB"
    }
    turns = {name: [{"role": "user", "content": text}] for name, text in first.items()}
    answers = {
        name: served.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 8}).json
        for name, messages in turns.items()
    }
    for name in "AB":
        said = answers[name]["choices"][0]["message"]["content"] or "."
        messages = [
            *turns[name],
            {"role": "assistant", "content": said},
            {"role": "user", "content": "And four?"},
        ]
        usage = served.ask("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 8}).json[
            "usage"
        ]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 10
