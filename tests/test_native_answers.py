"""`--device adb`: the native runner answers, through a real adbd, and under bionic where there is one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.devices import open_device
from gemma_edge.devices.native_model import NativeModel
from gemma_edge.devices.push import FileDevice
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import BundleError, DeviceError
from support.device_servers import Adbd, adbd_missing
from support.native_build import build_runner
from support.processes import ended, wait_for

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
PICTURE, SOUND = POCKET / "samples" / "image-what-0.png", POCKET / "samples" / "speech-commands-0.wav"
QUESTION = "I have a question. Who are you?"
DEVICE = f"adb:{Adbd.SERIAL}"
GREEDY = ("--temperature", "0", "--max-tokens", "24")
# A device's root with /system/bin/linker64 and /system/lib64, for arm64.
BIONIC = os.environ.get("GEMMA_EDGE_BIONIC_ROOT")


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "pocket.litertlm"
    return export_bundle(POCKET, path, format="litertlm", recipe="fp32", context=512, verify=False).path


@pytest.fixture(scope="module")
def long_winded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers are noise, and end with the context."""
    path = tmp_path_factory.mktemp("model") / "tiny.litertlm"
    options: dict[str, Any] = {"context": 4096, "verify": False, "calibrate": "none"}
    return export_bundle(tiny_checkpoint, path, format="litertlm", **options).path


@pytest.fixture(scope="module")
def phone(linux_runner: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adbd]:
    """A daemon, and the runner where it is looked for. The machine behind it is this one."""
    if reason := adbd_missing():
        pytest.skip(reason)
    folder, patch = tmp_path_factory.mktemp("phone"), pytest.MonkeyPatch()
    server = Adbd(folder, megabytes=512)
    for name, value in server.environment.items():
        patch.setenv(name, value)
    patch.setenv("GEMMA_EDGE_CACHE", str(folder / "cache"))
    (folder / "cache" / "runner").mkdir(parents=True)
    (folder / "cache" / "runner" / f"android-{os.uname().machine}").symlink_to(linux_runner)
    yield server
    patch.undo()
    server.close()


def running() -> list[int]:
    """Runners on the device, whose processes are seen here."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().partition(b"\0")[0].endswith(b"/gemma-answer"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if not ended(pid)]


def test_an_answer(phone: Adbd, pocket: Path, said) -> None:  # type: ignore[no-untyped-def]
    code, there, err = said("run", "--device", DEVICE, pocket, "-u", *GREEDY, QUESTION)
    assert code == 0, err
    assert "tok/s; first token" in err and err.strip().endswith("; stop")
    assert said("run", pocket, *GREEDY, QUESTION)[1] == there != ""
    wait_for(lambda: not running(), "left running there")


def test_usage_as_json(phone: Adbd, pocket: Path, said) -> None:  # type: ignore[no-untyped-def]
    spoken = {}
    for name, more in (("there", ["--device", DEVICE]), ("here", [])):
        code, out, err = said(
            "run", pocket, *more, "-s", "Be brief.", "--max-tokens", "5", "--json", QUESTION
        )
        assert code == 0, err
        spoken[name] = json.loads(out)
    there, here = spoken["there"], spoken["here"]
    assert there["finish_reason"] == here["finish_reason"] == "length"
    assert there["usage"]["prompt_tokens"] == here["usage"]["prompt_tokens"]
    assert there["usage"]["completion_tokens"] == 5


def test_a_chat(phone: Adbd, pocket: Path, tmp_path: Path) -> None:
    """It keeps the conversation, takes a picture, and is saved; the same as on this machine."""
    turns = 'What is 2 + 3?\n"""\nWho\nare you?\n"""\n/context\n'
    turns += f"/attach {PICTURE}\nWhat is this?\n/reset\nWho are you?\n"
    runs = []
    for name, more in (("here", []), ("there", ["--device", DEVICE])):
        argv = [sys.executable, "-m", "gemma_edge", "chat", "-u", *more, *GREEDY]
        argv += ["--session", str(tmp_path / name), str(pocket)]
        runs.append(subprocess.run(argv, input=turns, capture_output=True, encoding="utf-8"))
        assert runs[-1].returncode == 0, runs[-1].stderr
        assert (tmp_path / name).exists()
    assert runs[0].stdout == runs[1].stdout
    # The second turn is not computed anew there.
    assert "(0 cached" not in [line for line in runs[1].stderr.splitlines() if "cached" in line][1]
    # And it goes on there.
    argv += ["--overflow", "error"]
    run = subprocess.run(argv, input="What is 2 + 3?\n", capture_output=True, encoding="utf-8")
    assert run.returncode == 0 and "1 turns so far" in run.stderr, run.stderr


def test_what_is_seen_and_heard(phone: Adbd, pocket: Path, said) -> None:  # type: ignore[no-untyped-def]
    code, there, err = said("describe", "--device", DEVICE, pocket, PICTURE)
    assert code == 0 and said("describe", pocket, PICTURE)[1] == there != "", err
    # LiteRT-LM does not pad a recording, as Pocket learnt it: what it makes of one differs.
    for verb in ("transcribe", "translate"):
        code, out, err = said(verb, "--device", DEVICE, pocket, "--max-tokens", "8", SOUND)
        assert code == 0 and out.startswith("[00:00:00,000 --> "), err
    wait_for(lambda: not running(), "left running there")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--min-p", "0.1"], "takes no min-p"),
        (["--repetition-penalty", "1.5"], "takes no repetition-penalty"),
        (["--json", "--logprobs", "0"], "takes no logprobs"),
        (["--logit-bias", "yes=5"], "takes no logit-bias"),
        (["--raw"], "takes no raw"),
        (["--speculate"], "takes no speculate"),
        (["--tools", str(POCKET / "samples" / "tools.json")], "takes no tools"),
        (["--prefix-cache", "1GiB"], "--prefix-cache"),
        (["--batch", "prompts.jsonl"], "--batch"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_options_that_the_runner_lacks(phone: Adbd, pocket: Path, said, words: list[str], told: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = said("run", "--device", DEVICE, pocket, *words, QUESTION)
    assert (code, out, err.count("\n")) == (2, "", 1) and told in err


def test_what_cannot_answer_there(phone: Adbd, pocket: Path, said, tiny_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = said("run", "--device", DEVICE, tiny_bundle, QUESTION)
    assert code == 2 and "takes a .litertlm; gemma-edge export --format litertlm" in err
    code, _, err = said("run", "--device", "adb:nowhere", pocket, QUESTION)
    assert code == 4 and "no such device" in err
    code, _, err = said("run", "--device", "pigeon:1", pocket, QUESTION)
    assert code == 2 and "expected ssh://" in err and "adb:SERIAL" in err


def test_no_runner_is_built(phone: Adbd, pocket: Path, tmp_path: Path) -> None:
    with NativeModel.load(pocket, defer_decoder=True) as model, open_device(DEVICE) as device:
        assert isinstance(device, FileDevice)
        with pytest.raises(DeviceError, match=r"no gemma-answer in .* build it: .*build.sh android"):
            model.connect(device, runner=tmp_path)


def test_a_model_that_the_engine_refuses(phone: Adbd, pocket: Path, tmp_path: Path) -> None:
    """Its checks here pass; LiteRT-LM's do not."""
    model = NativeModel.load(shutil.copy(pocket, tmp_path / "pocket.litertlm"), defer_decoder=True)
    with open_device(DEVICE) as device, model:
        assert isinstance(device, FileDevice)
        model.connect(device)
        # What is sent is damaged after it was opened.
        (tmp_path / "pocket.litertlm").write_bytes(b"LITERTLM" + bytes(1000))
        with pytest.raises(BundleError, match="one that LiteRT-LM loads"):
            model.generate("Hi")


def test_an_answer_that_is_not_read_to_its_end(phone: Adbd, long_winded: Path) -> None:
    """The next one is another answer."""
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3000}
    with open_device(DEVICE) as device, NativeModel.load(long_winded, defer_decoder=True) as model:
        assert isinstance(device, FileDevice)
        model.connect(device)
        first = model.generate("Hi", max_tokens=8, temperature=0.0)
        for _ in range(2):
            stream = model.generate("Hi", stream=True, **greedy)
            assert first.text.startswith(next(stream))
            stream.cancel()
            assert stream.completion.finish_reason == "cancelled"
        assert model.generate("Hi", max_tokens=8, temperature=0.0).text == first.text
        stop = first.text[2:6]
        answer = model.generate("Hi", stop=stop, **greedy)
        assert (answer.text, answer.finish_reason) == (first.text.partition(stop)[0], "stop")
        model.close()
    wait_for(lambda: not running(), "left running there")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_end_here_is_the_end_there(phone: Adbd, pocket: Path, end: signal.Signals) -> None:
    argv = [sys.executable, "-m", "gemma_edge", "chat", "--device", DEVICE, str(pocket)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Who are you?\n")
        process.stdin.flush()
        assert process.stdout.readline()
        assert running()
        process.send_signal(end)
        process.stdin.close()
        # Where the answer is not quite over, Ctrl-C ends that alone, and the end of stdin the chat.
        assert process.wait() in {signal.SIGINT: (130, 0), signal.SIGKILL: (-9,)}[end]
    wait_for(lambda: not running(), "left running there")


def test_a_device_that_dies(phone: Adbd, pocket: Path) -> None:
    with open_device(DEVICE) as device, NativeModel.load(pocket, defer_decoder=True) as model:
        assert isinstance(device, FileDevice)
        model.connect(device)
        assert model.generate("Who are you?", max_tokens=4).text
        phone.kill()
        try:
            with pytest.raises(DeviceError):
                model.generate("Who are you?")
        finally:
            phone.revive()
        assert model.generate("Who are you?", max_tokens=4).text
        model.close()


# The program itself.


def test_an_interrupt_ends_an_answer(linux_runner: Path, long_winded: Path, tmp_path: Path) -> None:
    """The pipe holds a few pieces: without a reader, the answer cannot be over before the interrupt."""
    argv = [f"{linux_runner}/gemma-answer", str(long_winded), str(tmp_path), "1", "4096", "0", "0"]
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(b'new 1 1 1 0 []\nsay 0 {"role": "user", "content": "Hi"}\n')
        process.stdin.flush()
        with os.fdopen(reading, "rb") as said:
            assert said.readline().startswith(b"ready ")
            assert said.readline().startswith(b"piece ")
            process.send_signal(signal.SIGINT)
            last = next(line for line in said if not line.startswith(b"piece "))
            assert last.startswith(b"done cancelled ")
            process.stdin.write(b"nonsense\n")
            process.stdin.flush()
            assert said.read() == b""
        assert process.wait() == 2
        assert process.stderr is not None and b"no such request: nonsense" in process.stderr.read()


REQUESTS = """\
say 0 {"role": "user", "content": "Hi"}
new 1 1 1 0 []
say 0 {"role": "user"
say 4 {"role": "user", "content": "Hi"}
new 1 0 1 0 []
say 4 {"role": "user", "content": "Hi"}
end
"""


def words(argv: list[str], model: Path, cache: Path) -> list[str]:
    """The first words of what the program says to REQUESTS."""
    cache.mkdir()
    options = [str(model), str(cache), "1", "256", "0", "0"]
    done = subprocess.run([*argv, *options], input=REQUESTS, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


EXPECTED = ["ready", "error", "error", "piece", "piece", "piece", "piece", "done", "error"]


def test_requests_that_are_none(linux_runner: Path, long_winded: Path, tmp_path: Path) -> None:
    said = words([str(linux_runner / "gemma-answer")], long_winded, tmp_path / "cache")
    assert [word for word in said if word != "piece"] == [word for word in EXPECTED if word != "piece"]


def test_under_bionic(long_winded: Path, tmp_path: Path) -> None:
    """The program for Android, by Android's own linker and libc, on an emulated Cortex-A76."""
    if BIONIC is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64, or no arm64 Android root in $GEMMA_EDGE_BIONIC_ROOT")
    program = build_runner("android", tmp_path / "runner") / "gemma-answer"
    argv = ["qemu-aarch64", "-cpu", "cortex-a76", "-L", BIONIC, str(program)]
    said = words(argv, long_winded, tmp_path / "cache")
    assert [word for word in said if word != "piece"] == [word for word in EXPECTED if word != "piece"]
