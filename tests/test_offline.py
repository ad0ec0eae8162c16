"""Nothing leaves this machine: every verb under strace, which sees each socket and each file that is made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemma_edge.cli.main import VERBS
from gemma_edge.devices.local import LocalDevice
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.host.offline import SILENCED, offline_variables, silence_telemetry
from support.hub_server import TOKEN, Hub, serving_hub
from support.strace import can_trace

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
CALLS = "socket,connect,bind,sendto,sendmsg,?open,openat,?creat,?mkdir,mkdirat,?rename,?renameat,renameat2"
CALLS += ",?link,linkat,?symlink,symlinkat,?mknod,mknodat"
LOOPBACK = re.compile(r'inet_addr\("127\.|"::1"')
LOOKED_UP = re.compile(r"/etc/resolv\.conf|/run/systemd/resolve|/run/nscd|/var/run/nscd")
# No files, though a program may open them for writing: devices, the kernel's own, control groups.
NO_FILES = ("/dev/", "/proc/", "/sys/")
TEMPORARY = re.compile(r"gemma-edge-|(tmp)?[a-z0-9_]{8}$")  # ours, and Python's own, which it removes at once
SECONDS_UNTIL_TELEMETRY = 8
STAY = f"""
import sys, time
from gemma_edge.runtime import Model
model = Model.load(sys.argv[1])
print(model.generate("What is 2 + 3?", max_tokens=2).text)
time.sleep({SECONDS_UNTIL_TELEMETRY})
"""

PICTURE, SOUND = "samples/image-what-0.png", "samples/speech-commands-0.wav"
SIZES = "-p 16 -n 4 -r 1 --requests 1 --prompt 16 --tokens 4 --bandwidth 0s"
# Every verb, at least once. {onnx} and {litertlm} are bundles of the checkpoint {pocket}.
COMMANDS = {
    "demo": "demo",
    "synth": "synth {out}/checkpoint",
    "plan": "plan {pocket} --for pi5 --modalities text",
    "slice": "slice {pocket} {out}/slice --ffn 192",
    "export": "export {pocket} {out}/tflite --format tflite --recipe int8 --context 256",
    "inspect": "inspect --check {litertlm}",
    "verify": "verify {onnx} --source {pocket}",
    "run": "run {onnx} Hello --max-tokens 4",
    "run a .litertlm": "run {litertlm} Describe. --max-tokens 4 -a {pocket}/" + PICTURE,
    "chat": "chat {onnx} --max-tokens 4",
    "describe": "describe {onnx} {pocket}/" + PICTURE,
    "transcribe": "transcribe {onnx} {pocket}/" + SOUND,
    "translate": "translate {litertlm} {pocket}/" + SOUND,
    "eval": "eval {onnx} {pocket}/samples/questions.jsonl",
    "bench": "bench {onnx} " + SIZES + " --device local -o {out}/results.jsonl",
    "tune": "tune {onnx} -p 16 -n 2 -r 1 --rounds 2",
    "serve": "serve {onnx} --port 0 --check",
    "cache": "cache --limit 1GiB",
    "deploy": "deploy --help",  # beyond that it is ssh which reaches the device that was named
    "android": "android --help",  # beyond that it is adb which reaches the phone that was named
    "doctor": "doctor {onnx}",
    "list": "list {root}",
    "pull": "pull alice/pocket {out}/pulled",
    "push": "push {onnx} alice/new --license apache-2.0",
    "recipes": "recipes int4",
    "completion": "completion bash",
    "report": "report {root}/benchmarks/results/1-parity.jsonl -o {out}/report.html",
}


strace = pytest.mark.skipif(not can_trace(), reason="no strace (tests/install.sh), or it may not trace here")


@dataclass(frozen=True)
class Traced:
    """A command that ended: what it said, and its system calls of CALLS, one a line."""

    folder: Path
    done: subprocess.CompletedProcess[str]
    calls: list[str]

    def leaks(self) -> list[str]:
        """Calls that reach beyond this machine, or make a file where none of ours belongs."""
        return [call for call in self.calls if self._reaches_out(call) or self._makes_elsewhere(call)]

    @staticmethod
    def _reaches_out(call: str) -> bool:
        if LOOKED_UP.search(call):
            return True
        return "AF_INET" in call and "sin" in call and not LOOPBACK.search(call)

    def _makes_elsewhere(self, call: str) -> bool:
        path = made(call)
        if path is None or str(path).startswith(NO_FILES):
            return False
        path = Path(os.path.normpath(self.folder / "out" / path))
        if path.is_relative_to(self.folder / "tmp"):
            return not TEMPORARY.match(path.relative_to(self.folder / "tmp").parts[0])
        return not any(path.is_relative_to(self.folder / name) for name in ("out", "cache"))


def made(call: str) -> Path | None:
    """The file, folder or name that a call has made; None for other calls."""
    name = call.partition("(")[0]
    if name == "???":  # strace saw a thread end before it could read which call that was
        return None
    if " = -1 " in call or (name.startswith("open") and "O_CREAT" not in call):
        return None
    if name in ("socket", "connect", "bind", "sendto", "sendmsg"):
        return None
    # -y puts a folder's path behind its descriptor: openat(7</tmp/x>, "name", ...).
    paths = re.findall(r'(?:(?:\d+|AT_FDCWD)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"', call)
    folder, path = paths[-1]
    return Path(folder) / path


def trace(argv: list[str], folder: Path, stdin: str = "") -> Traced:
    """Runs a program under strace, at home in an empty folder."""
    for name in ("home", "out", "cache", "tmp"):
        (folder / name).mkdir(parents=True)
    log = folder / "strace"
    places = {"HOME": "home", "GEMMA_EDGE_CACHE": "cache", "TMPDIR": "tmp"}
    unset = (*SILENCED, "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: str(folder / place) for name, place in places.items()}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    options = f"-f -qq -y --seccomp-bpf -e trace={CALLS} -e signal=none -o"
    done = subprocess.run(
        ["strace", *options.split(), str(log), *argv],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=folder / "out",
        env=environment,
        timeout=600,
        check=False,
    )
    return Traced(folder, done, list(whole_calls(log.read_text(encoding="utf-8", errors="replace"))))


def whole_calls(log: str) -> Iterator[str]:
    """The calls of all threads without their ids; those that another interrupted are put together again."""
    begun: dict[str, str] = {}
    for line in log.splitlines():
        thread, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>", call):
            yield begun.pop(thread, "") + call[resumed.end() :]
        else:
            yield call
    yield from begun.values()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("litert_lm_builder")
    folder = tmp_path_factory.mktemp("offline")
    return {
        format: export_bundle(
            POCKET, folder / name, recipe="int8", context=512, format=format, verify=False
        ).path
        for format, name in (("onnx", "onnx"), ("litertlm", "pocket.litertlm"))
    }


@pytest.fixture
def hub(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model hub on this machine, with one of the bundles."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with serving_hub(monkeypatch) as hub:
        hub.add("alice/pocket", {path.name: path.read_bytes() for path in bundles["onnx"].iterdir()})
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.parametrize("name", COMMANDS)
@strace
def test_a_verb_reaches_nobody_and_writes_where_it_may(
    bundles: dict[str, Path], hub: Hub, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "traced"
    places = {**bundles, "pocket": POCKET, "out": folder / "out", "root": POCKET.parents[1]}
    argv = [part.format(**places) for part in COMMANDS[name].split()]
    traced = trace([sys.executable, "-m", "gemma_edge.cli.main", *argv], folder, stdin="Hello\n")
    assert traced.done.returncode == 0, traced.done.stderr
    assert traced.leaks() == []
    assert [*(folder / "tmp").iterdir(), *(folder / "home").iterdir()] == []


def test_every_verb_is_looked_at() -> None:
    assert {command.split()[0] for command in COMMANDS.values()} == set(VERBS), "add the verb to COMMANDS"


@pytest.mark.parametrize("format", ["onnx", "litertlm"])
@strace
def test_a_loaded_model_reaches_nobody_later(bundles: dict[str, Path], tmp_path: Path, format: str) -> None:
    """ONNX Runtime's telemetry begins some seconds after the first session."""
    traced = trace([sys.executable, "-c", STAY, str(bundles[format])], tmp_path / "traced")
    assert traced.done.returncode == 0, traced.done.stderr
    assert traced.leaks() == []


@strace
def test_what_strace_would_see(tmp_path: Path) -> None:
    """The judge finds each of these, and nothing else. Connecting a datagram socket sends nothing."""
    allowed = """
import os, socket, tempfile
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
open("here", "w").close()
os.mkdir(os.environ["GEMMA_EDGE_CACHE"] + "/x")
tempfile.TemporaryFile().close()
tempfile.mkdtemp(prefix="gemma-edge-")
open("/dev/null", "w")
"""
    leaking = f"""
socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 443))
socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect_ex(("2001:db8::1", 443))
open("{tmp_path}/elsewhere", "w")
os.mkdir(os.environ["HOME"] + "/.cache")
os.rename("here", "../there")
open(os.environ["TMPDIR"] + "/.ses", "w")
"""
    assert trace([sys.executable, "-c", allowed], tmp_path / "a").leaks() == []
    seen = trace([sys.executable, "-c", allowed + leaking], tmp_path / "b").leaks()
    expected = ("192.0.2.1", "2001:db8::1", "elsewhere", ".cache", "there", ".ses")
    assert len(seen) == len(expected) and all(part in call for part, call in zip(expected, seen, strict=True))


def test_an_engine_is_silenced_before_it_is_loaded() -> None:
    code = "import os, sys, gemma_edge.runtime; print('onnxruntime' in sys.modules, *map(os.environ.get, "
    code += "sys.argv[1:]))"
    environment = {name: value for name, value in os.environ.items() if name not in SILENCED}
    argv = [sys.executable, "-c", code, *SILENCED]
    done = subprocess.run(argv, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == ["False", "1", "1"]


def test_a_value_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    silence_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert offline_variables() == {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_program_on_a_device_is_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    with LocalDevice() as device:
        for name in SILENCED:
            monkeypatch.delenv(name)  # of this process: a device does not inherit
        said = device.run(["env"], timeout=60).stdout.splitlines()
        assert {f"{name}=1" for name in SILENCED} <= set(said)
        given = device.run(["env"], timeout=60, env={"ORT_DISABLE_TELEMETRY": "0"}).stdout.splitlines()
        assert "ORT_DISABLE_TELEMETRY=0" in given
