"""`gemma-edge deploy`, and the verbs that answer on a device: Pocket behind a real sshd, in another home."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest

from gemma_edge.cli.main import main
from gemma_edge.devices import open_device
from gemma_edge.devices.deployment import UNIT, unit
from gemma_edge.devices.install import fetch_wheels
from gemma_edge.devices.push import FileDevice
from gemma_edge.runtime.errors import DeviceError
from support.device_servers import Sshd, sshd_missing
from support.loopback_port import spare_port
from support.processes import PATIENCE_S, ended, wait_for
from support.systemd_server import SystemdServer, systemd_missing

SAMPLES = Path(__file__).parents[1] / "pocket" / "checkpoint" / "samples"
PICTURE, SOUND = SAMPLES / "image-what-0.png", SAMPLES / "speech-commands-0.wav"
QUESTION = "I have a question. Who are you?"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A machine behind ssh with an empty home."""
    if reason := sshd_missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("board")
    (folder / "home").mkdir()
    kind = Sshd if systemd_missing() else SystemdServer
    server, patch = kind(folder, folder / "home"), pytest.MonkeyPatch()
    server.start()
    patch.setenv("GEMMA_EDGE_SSH_CONFIG", str(server.config))
    yield server
    server.kill()
    patch.undo()


@pytest.fixture(scope="module")
def bundle(pocket_bundles: dict[str, Path]) -> Path:
    return pocket_bundles["onnx"]


@pytest.fixture(scope="module")
def deployed(board: Sshd, bundle: Path) -> Sshd:
    """The same with Pocket deployed."""
    assert main(["deploy", str(bundle), board.url]) == 0
    return board


def home(board: Sshd) -> Path:
    return board.folder / "home"


def ours(board: Sshd) -> list[int]:
    """Processes of the environment on the board."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{home(board)}/.gemma-edge/python-".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def command_of(pid: int) -> str:
    """Its words, with zeros between; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_what_is_there_after_deploy(deployed: Sshd, bundle: Path) -> None:
    root = home(deployed) / ".gemma-edge"
    assert not list(root.rglob("*.whl"))
    (environment,) = root.glob("python-*")
    assert list(environment.rglob("onnxruntime")) and not list(environment.rglob("ai_edge_litert"))
    launcher = home(deployed) / ".local" / "bin" / "gemma-edge"
    argv = [str(launcher), "run", "--max-tokens", "8", QUESTION]
    clean = {"PATH": os.environ["PATH"], "HOME": str(home(deployed))}
    there = subprocess.run(argv, capture_output=True, text=True, env=clean, stdin=subprocess.DEVNULL)
    argv = [sys.executable, "-m", "gemma_edge", "run", str(bundle), "--max-tokens", "8", QUESTION]
    here = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert there.returncode == 0 and there.stdout == here.stdout != ""


def test_what_is_there_is_not_sent_again(deployed: Sshd, bundle: Path, said) -> None:  # type: ignore[no-untyped-def]
    code, out, err = said("deploy", bundle, deployed.url)
    assert code == 0
    assert "sent no runtime, it was there, no bundle, it was there" in err
    assert "engines" in err and "fits" in err and out == ""
    assert "gemma-edge run --device" in err


def test_environments_in_use_or_of_others_stay(deployed: Sshd, bundle: Path, said) -> None:  # type: ignore[no-untyped-def]
    """What `deploy` made earlier goes, once nothing runs in it."""
    root = home(deployed) / ".gemma-edge"
    (current,) = root.glob("python-*")
    others, busy, idle = (root / f"python-00000000000{letter}" for letter in "abc")
    for each in (others, busy, idle):
        (each / "bin").mkdir(parents=True)
        (each / "ready").write_text("something older\n")
        (each / "bin" / "python").symlink_to(shutil.which("sleep") or "")
    record = root / "deployed.json"
    noted = json.loads(record.read_text())
    assert noted["made"] == [str(current)]
    record.write_text(json.dumps({**noted, "made": [str(current), str(busy), str(idle)]}))
    started = f"{busy}/bin/python"

    def at_work() -> list[int]:
        return [pid for pid in ours(deployed) if command_of(pid).startswith(started)]

    ssh = ["ssh", "-F", str(deployed.config), "-p", str(deployed.port), "127.0.0.1", f"exec {started} 600"]
    with subprocess.Popen(ssh, stdin=subprocess.DEVNULL):
        wait_for(at_work, "it does not run there")
        try:
            code, _, err = said("deploy", bundle, deployed.url)
        finally:
            for pid in at_work():
                os.kill(pid, signal.SIGKILL)
    assert code == 0
    assert set(root.glob("python-*")) == {current, others, busy}
    assert str(others) in err and str(busy) in err
    assert said("deploy", bundle, deployed.url)[0] == 0
    assert set(root.glob("python-*")) == {current, others}
    shutil.rmtree(others)


def test_an_answer_is_the_same_as_here(deployed: Sshd, bundle: Path, said) -> None:  # type: ignore[no-untyped-def]
    options = ("--max-tokens", "8", "--usage")
    _, here, _ = said("run", bundle, QUESTION, *options)
    for words in ((QUESTION,), (bundle, QUESTION)):
        code, out, err = said("run", "--device", deployed.url, *words, *options)
        assert (code, out) == (0, here)
        assert "answer 8 tokens" in err or "stop" in err
    code, out, _ = said("run", "--device", deployed.url, "--json", QUESTION)
    assert code == 0 and json.loads(out)["usage"]["completion_tokens"] > 0


def test_a_prompt_from_stdin(deployed: Sshd, bundle: Path) -> None:
    argv = [sys.executable, "-m", "gemma_edge", "run", "--max-tokens", "6", "-"]
    text = "Ünïcode\nof two lines, 'quoted' $HOME `x`\n"
    runs = [
        subprocess.run([*argv, *more], input=text, capture_output=True, encoding="utf-8")
        for more in (["-m", str(bundle)], ["--device", deployed.url])
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stdout == runs[1].stdout


def test_attachments_travel_and_keep_their_names(
    deployed: Sshd, bundle: Path, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    shutil.copy(PICTURE, "a b/it's.png")
    shutil.copy(SOUND, "-s.wav")
    for verb, *files in (("describe", "a b/it's.png", "./-s.wav"), ("transcribe", "./-s.wav")):
        _, here, _ = said(verb, bundle, *files)
        code, out, _ = said(verb, "--device", deployed.url, *files)
        assert code == 0
        assert out.replace("-s.wav", "./-s.wav").replace("././", "./") == here
    _, here, _ = said("run", bundle, "Describe.", "-a", "a b/it's.png", "--max-tokens", "8")
    code, out, _ = said(
        "run", "--device", deployed.url, "Describe.", "-a", "a b/it's.png", "--max-tokens", "8"
    )
    assert (code, out) == (0, here)
    assert list((home(deployed) / ".gemma-edge" / "runs").iterdir()) == []


def test_exit_codes_and_errors_come_back(deployed: Sshd, said, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = said("run", "--device", deployed.url, "Hello", "--max-tokens", "0")
    assert code == 2 and "max_tokens must be" in err
    code, _, err = said("run", "--device", deployed.url, "x " * 4000)
    assert code == 2 and "context" in err
    (tmp_path / "no.png").write_bytes(b"nothing")
    code, _, err = said("describe", "--device", deployed.url, tmp_path / "no.png")
    assert code == 3
    code, _, err = said("run", "--device", deployed.url, "one", "two")
    assert code == 2 and "expected one prompt" in err
    code, _, err = said("run", "--device", deployed.url, "--batch", "x.jsonl")
    assert code == 2 and "--batch" in err


def test_a_chat(deployed: Sshd, bundle: Path, tmp_path: Path) -> None:
    """Several turns, a picture, a conversation that is kept here; the same as on this machine."""
    turns = 'What is 2 + 3?\n"""\nWho\nare you?\n"""\n/context\n'
    turns += f"/attach {PICTURE}\nDescribe.\n/save {tmp_path}/NAME\n"
    runs = []
    for name, more in (("here", ["-m", str(bundle)]), ("there", ["--device", deployed.url])):
        argv = [
            sys.executable,
            "-m",
            "gemma_edge",
            "chat",
            "--session",
            str(tmp_path / f"{name}.kept"),
            *more,
        ]
        argv += ["--max-tokens", "12"]
        text = turns.replace("NAME", name)
        runs.append(subprocess.run(argv, input=text, capture_output=True, encoding="utf-8"))
        assert (tmp_path / name).exists() and (tmp_path / f"{name}.kept").exists()
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
    gauges = [line for run in runs for line in run.stderr.splitlines() if "tokens" in line and " of " in line]
    assert gauges[0] == gauges[-1]
    # And it goes on there.
    argv = [sys.executable, "-m", "gemma_edge", "chat", "--session", str(tmp_path / "there.kept")]
    argv += ["--device", deployed.url, "--max-tokens", "2"]
    run = subprocess.run(argv, input="Hi\n", capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and "3 turns so far" in run.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_here_is_the_end_there(deployed: Sshd, end: signal.Signals) -> None:
    argv = [sys.executable, "-m", "gemma_edge", "chat", "--device", deployed.url]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: ours(deployed), "it never ran there")
    process.send_signal(end)
    code = process.wait(PATIENCE_S)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[end]
    wait_for(lambda: not ours(deployed), "left running there")


def test_the_unit_is_one(tmp_path: Path) -> None:
    text = unit(["--port", "8000", 'a "b" %h $x'])
    assert 'serve "--port" "8000" "a \\"b\\" %%h $$x"' in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    path = tmp_path / UNIT
    path.write_text(text.replace("%h/.local/bin/gemma-edge", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True
    )
    assert UNIT not in checked.stderr, checked.stderr


def test_serve(deployed: Sshd, bundle: Path, said) -> None:  # type: ignore[no-untyped-def]
    """A living systemd starts the unit, and again after a crash; without one, that is told."""
    port = spare_port()
    has = isinstance(deployed, SystemdServer) and deployed.has_systemd()
    code, _, err = said("deploy", bundle, deployed.url, "--serve", "--port", port)
    if not has:
        assert code == 4 and err.strip().splitlines()[-1].startswith("gemma-edge: error: ")
        return
    assert code == 0 and "The service is active" in err, err

    def serving() -> list[int]:
        return [pid for pid in ours(deployed) if "\0serve\0" in command_of(pid)]

    models = f"http://127.0.0.1:{port}/v1/models"

    def answers() -> bool:
        with contextlib.suppress(OSError), urlopen(models, timeout=60) as answer:
            return bool(json.load(answer)["data"])
        return False

    wait_for(answers, "the service does not answer")
    before = serving()[0]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: ended(before) and answers(), "systemd does not start it again")


# Refusals.


def test_a_command_of_somebody_else_stays(board: Sshd, bundle: Path, said) -> None:  # type: ignore[no-untyped-def]
    launcher = home(board) / ".local" / "bin" / "gemma-edge"
    kept = launcher.read_bytes() if launcher.exists() else None
    launcher.parent.mkdir(parents=True, exist_ok=True)
    launcher.write_text("#!/bin/sh\necho mine\n")
    code, _, err = said("deploy", bundle, board.url)
    assert code == 4 and "is not ours" in err
    assert launcher.read_text() == "#!/bin/sh\necho mine\n"
    launcher.unlink()
    if kept is not None:
        launcher.write_bytes(kept)
        launcher.chmod(0o755)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["deploy", "ssh://pi"], 2, "name the bundle"),
        (["deploy", "{bundle}", "adb"], 2, "expected"),
        (["run", "{bundle}", "--device", "adb", "--batch", "x.jsonl"], 2, "--batch"),
        (["deploy", "{bundle}", "ssh://-oProxyCommand=x"], 2, "expected ssh://"),
        (["deploy", "{bundle}", "ssh://pi:secret@host"], 2, "keys, not passwords"),
        (["deploy", "{bundle}", "ssh://pi", "--uninstall"], 2, "leave"),
        (["deploy", "{bundle}", "ssh://pi", "--extra", "nonsense"], 2, "no extra"),
        (["deploy", "/nowhere", "ssh://pi"], 3, "/nowhere"),
        (["deploy", "{bundle}", "ssh://no-such-host.invalid"], 4, "no such host"),
        (["run", "--device", "usb", "Hi"], 2, "expected ssh://"),
        (["run", "--device", "ssh://no-such-host.invalid", "Hi"], 4, "no such host"),
        (["chat", "--device", "ssh://no-such-host.invalid", "--tools", "x.py"], 2, "--tools"),
    ],
)
def test_what_is_refused(
    bundle: Path,
    said,
    words: list[str],
    code: int,
    told: str,  # type: ignore[no-untyped-def]
) -> None:
    got, _, err = said(*(word.format(bundle=bundle) for word in words))
    assert got == code and told in err
    assert len(err.strip().splitlines()) == 1


def test_a_key_that_is_refused(board: Sshd, said, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("GEMMA_EDGE_SSH_CONFIG", str(board.ssh_config("other_key")))
    code, _, err = said("run", "--device", board.url, "Hi")
    assert code == 4 and "ssh-copy-id" in err


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"python": None}, "no python3"),
        ({"python": "3.9.2"}, "3.11"),
        ({"libc": "musl"}, "glibc"),
        ({"libc": "glibc 2.27"}, "2.28"),
        ({"bits": 32}, "64-bit"),
        ({"arch": "armv7l"}, "64-bit"),
    ],
)
def test_a_board_that_cannot_run_it(changed: dict[str, object], told: str) -> None:
    with open_device("local") as device:
        facts = replace(device.facts, **changed)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="Remedy") as error:
        fetch_wheels(facts)
    assert told in str(error.value)


def test_too_little_room(board: Sshd, bundle: Path, said, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(FileDevice, "free_bytes", lambda self: 1 << 20)
    code, _, err = said("run", "--device", f"{board.url}{board.folder}/small", bundle, "Hi")
    assert code == 4 and "no space left" in err and "1 MiB free" in err


def test_nothing_is_deployed(board: Sshd, said) -> None:  # type: ignore[no-untyped-def]
    code, _, err = said("run", "--device", f"{board.url}{board.folder}/nothing", "Hi")
    assert code == 4 and "gemma-edge deploy" in err


# At last.


def test_uninstall_leaves_nothing(deployed: Sshd, said) -> None:  # type: ignore[no-untyped-def]
    """Nothing but what was somebody else's, even in our own folder."""
    root = home(deployed) / ".gemma-edge"
    (root / "mine.txt").write_text("x")
    assert said("deploy", deployed.url, "--uninstall")[0] == 0
    left = [
        path.relative_to(home(deployed)).as_posix() for path in home(deployed).rglob("*") if path.is_file()
    ]
    assert left == [".gemma-edge/mine.txt"]
    wait_for(lambda: not ours(deployed), "the service goes on")
    (root / "mine.txt").unlink()
    assert said("deploy", deployed.url, "--uninstall")[0] == 0
    assert not root.exists() and not (home(deployed) / ".local" / "bin").exists()
