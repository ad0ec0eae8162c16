"""What docs/serving.md says of proxies, systemd and Prometheus, done: its own lines, with real tools."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

import pytest

from support.http_server import KEEPALIVE_AT_ONCE, ServerProcess, endless, serving
from support.loopback_port import spare_port
from support.processes import PATIENCE_S, wait_for
from support.repository import ROOT

NAME = "gemma.example"
PERSON = "127.0.0.2"  # where the proxy's client is
DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMPLETIONS = "/v1/completions"

pytest.importorskip("uvicorn", reason="the extra serve has uvicorn")


def printed(language: str, number: int = 0) -> str:
    """The code of that language in the document."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)[number]


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if not shutil.which(tool)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (apt-get install)")


# Reverse proxies. --------------------------------------------------------------------------------------


def nginx(folder: Path, upstream: int, port: int) -> list[str]:
    """nginx with the document's lines; the ports, and a certificate made here, are put in."""
    pair = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-subj", f"/CN={NAME}"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *pair]
    subprocess.run(command, check=True, capture_output=True)
    lines = (
        printed("nginx")
        .replace("443", f"127.0.0.1:{port}")
        .replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    )
    lines = re.sub(r"(ssl_certificate \s*)\S+;", rf"\1{folder}/cert.pem;", lines)
    lines = re.sub(r"(ssl_certificate_key \s*)\S+;", rf"\1{folder}/key.pem;", lines)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\nevents {{}}\n"
        f"http {{ access_log off; {temporary}\n{lines} }}"
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]


def caddy(folder: Path, upstream: int, port: int) -> list[str]:
    """Caddy with the document's lines, and a certificate of its own instead of Let's Encrypt's."""
    lines = (
        printed("caddy").replace(NAME, f"{NAME}:{port}").replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    )
    options = ("admin off", "auto_https disable_redirects", "local_certs", "skip_install_trust")
    stored = f"storage file_system {folder}"
    (folder / "Caddyfile").write_text("\n".join(("{", *options, stored, "}", lines)))
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


PROXIES: dict[str, Callable[[Path, int, int], list[str]]] = {"nginx": nginx, "caddy": caddy}
TOOLS = {"nginx": ("nginx", "openssl"), "caddy": ("caddy",)}


@dataclass
class Proxied:
    """A proxy that listens with TLS, the server behind it, and the server's access log."""

    server: ServerProcess
    port: int
    log: Path

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the proxy, under its name."""
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S, source_address=(PERSON, 0))
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it signed its own certificate
        connection = http.client.HTTPConnection(NAME)
        connection.sock = context.wrap_socket(plain, server_hostname=NAME)
        return connection

    def post(self, body: object, **headers: str) -> http.client.HTTPResponse:
        connection = self.connect()
        names = {"Content-Type": "application/json", "Authorization": "Bearer open-sesame-please", **headers}
        connection.request("POST", COMPLETIONS, json.dumps(body).encode(), names)
        return connection.getresponse()


@pytest.fixture(params=[pytest.param(name, marks=needs(*tools)) for name, tools in TOOLS.items()])
def proxied(
    request: pytest.FixtureRequest, pocket_bundles: dict[str, Path], tmp_path: Path
) -> Iterator[Proxied]:
    log, port = tmp_path / "access.jsonl", spare_port()
    options = ["--allow-host", NAME, "--trusted-proxy", "127.0.0.1", "--api-key", "open-sesame-please"]
    options += ["--access-log", str(log)]
    with (
        serving(pocket_bundles["onnx"], *options, brakes=True, change=KEEPALIVE_AT_ONCE) as server,
        contextlib.ExitStack() as ending,
    ):
        started_proxy = PROXIES[request.param](tmp_path, server.port, port)
        with (tmp_path / "proxy.log").open("wb") as said:
            process = subprocess.Popen(started_proxy, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        ending.callback(process.wait, PATIENCE_S)
        ending.callback(process.terminate)

        def listens() -> bool:
            assert process.poll() is None, (tmp_path / "proxy.log").read_text()
            with contextlib.suppress(OSError):
                made.connect().close()
                return True
            return False

        made = Proxied(server, port, log)
        wait_for(listens, "the proxy never listened")
        yield made


def test_a_stream_is_not_collected_by_a_proxy(proxied: Proxied) -> None:
    """A comment of a few bytes comes through while the request waits: a proxy that collects would keep it."""
    key = {"Authorization": "Bearer open-sesame-please"}
    direct = proxied.server.connect()
    body = json.dumps(endless(max_tokens=900, stream=True)).encode()
    direct.request("POST", COMPLETIONS, body, {"Content-Type": "application/json", **key})
    with proxied.server.braked(5):  # so long that the second one's turn does not come
        first = direct.getresponse()
        first.readline()
        second = proxied.post(endless(max_tokens=2, stream=True))
        assert second.status == 200 and second.readline() == b": waiting\n"
        assert proxied.server.get("/health", **key).json["queue"]["waiting"] == 1
    direct.close()
    assert b"data: [DONE]\n" in second.read()


def test_the_server_knows_who_asks_a_proxy(proxied: Proxied) -> None:
    answer = proxied.post({"prompt": "2 +", "max_tokens": 2}, Origin=f"https://{NAME}")
    assert answer.status == 200 and json.load(answer)["choices"]
    assert proxied.post({"prompt": "2 +"}, Origin="https://else.example").status == 403
    wrong = proxied.post({"prompt": "2 +"}, Authorization="Bearer no")
    assert wrong.status == 401
    wait_for(lambda: proxied.log.read_text().count("\n") == 3, "a request is not in the log")
    clients = {line["client"] for line in map(json.loads, proxied.log.read_text().splitlines())}
    assert clients == {"default", PERSON}  # by the key's name; without one by the address, not the proxy's
    connection = proxied.connect()
    connection.request(
        "POST", "/login", "key=open-sesame-please", {"Content-Type": "application/x-www-form-urlencoded"}
    )
    cookie = connection.getresponse().headers["Set-Cookie"]
    assert "Secure" in cookie  # the server knows that the browser came by HTTPS


# systemd. ----------------------------------------------------------------------------------------------


@needs("systemd-socket-activate")
def test_systemd_passes_its_socket(pocket_bundles: dict[str, Path]) -> None:
    port = spare_port()
    serve = [sys.executable, "-m", "gemma_edge.cli.main", "serve", str(pocket_bundles["onnx"])]
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", *serve]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        probe = ServerProcess(process, port=port)  # type: ignore[arg-type]
        wait_for(lambda: _accepts(port), "systemd never listened")
        assert probe.chat().status == 200  # the request that started the server
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def _accepts(port: int) -> bool:
    """Whether a socket is in the state of listening; a connection would start the server."""
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)


@needs("systemd-analyze")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    units = {"gemma-edge.socket": printed("ini", 0), "gemma-edge.service": printed("ini", 1)}
    for name, text in units.items():
        # What is on the board and not here: the program, and the user.
        text = text.replace("/opt/gemma-edge/bin/gemma-edge", sys.executable).replace(
            "=gemma\n", f"={getuser()}\n"
        )
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "gemma-edge" in line]
    assert ours == [], done.stderr


# Prometheus. -------------------------------------------------------------------------------------------


@needs("promtool")
def test_prometheus_takes_rules_and_metrics(served_onnx: ServerProcess) -> None:
    rules = str(ROOT / "docs" / "prometheus-rules.yml")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    served_onnx.chat()
    metrics = served_onnx.get("/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
