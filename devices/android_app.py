"""The app of `android_demo/` on a phone: installed, given models, asked by intent, heard through logcat.

    app = AndroidApp(device)
    app.install(Path("gemma-edge.apk"))
    for text in app.ask("Why is the sky blue?", model=app.push_model(Path("e2b.litertlm"))):
        ...

The app writes an answer as numbered lines of JSON (`AnswerLog.java`), so a line that logcat drops is noticed,
and ends it with the SHA-256 of the whole.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_edge.devices.adb import AdbDevice
from gemma_edge.devices.base import Progress
from gemma_edge.devices.live_run import LiveRun
from gemma_edge.devices.shell import new_token
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder

PACKAGE = "dev.gemmaedge"
TAG = "GemmaEdge"
_ENTRY = f"{PACKAGE}/{PACKAGE}.app.FromComputer"
_INSTALL_S = 180.0
_START_S = 60.0
_GONE = 7  # exit code of the script below when the app's process is no more
_READ_LOG = f"""\
logcat -v raw -T "$1" -s {TAG}:I & log=$!
trap 'kill $log' EXIT
while kill -0 $log 2>/dev/null; do
  sleep 1
  pidof {PACKAGE} >/dev/null || {{ sleep 1; exit {_GONE}; }}
done
"""


def apk_path() -> Path:
    """Where `android_demo/build.sh apk` puts the APK."""
    return cache_folder() / "android" / "gemma-edge.apk"


class AndroidApp:
    """The app on one phone."""

    def __init__(self, device: AdbDevice) -> None:
        self.device = device
        self.figures: dict[str, Any] = {}  # of the last answer, as the app tells them at its end

    def install(self, apk: Path, progress: Progress | None = None) -> None:
        """Installs or updates the app; its conversation and models stay.

        Raises:
            UsageError: no such file.
            DeviceError: Android refuses it, such as an app that another key signed.
        """
        if not apk.is_file():
            raise UsageError(f"{apk}: no such file; build it: android_demo/build.sh apk")
        there = self.device.push(apk, progress=progress)
        answer = self.device.answer(f"pm install -r {shlex.quote(there)}", timeout=_INSTALL_S)
        said = (answer.text + answer.stderr).strip()
        self.device.remove_pushed(there)
        if answer.exit_code or "Success" not in said:
            raise self.device.error(f"Android does not install {apk.name}: {_why(said)}")

    def uninstall(self) -> None:
        """Removes the app with its conversation and its own copies of models; pushed models stay."""
        answer = self.device.answer(f"pm uninstall {PACKAGE}", timeout=_INSTALL_S)
        said = (answer.text + answer.stderr).strip()
        if answer.exit_code or "Success" not in said:
            raise self.device.error(f"Android does not remove {PACKAGE}: {_why(said)}")

    def push_model(self, model: Path, progress: Progress | None = None) -> str:
        """Sends a .litertlm where the app finds it; returns its path there. Raises as `Device.push`."""
        if model.suffix != ".litertlm":
            raise UsageError(f"{model}: the app takes a .litertlm; gemma-edge export --format litertlm")
        there = self.device.push(model, progress=progress)
        # The app is another user: it may look into our folders, and read this file.
        folder = posixpath.dirname(there)
        folders = (self.device.root, posixpath.dirname(folder), folder)
        self.device.sh(f"chmod a+rx {shlex.join(folders)} && chmod a+r {shlex.quote(there)}")
        return there

    def ask(self, prompt: str, model: str = "", **options: bool | int) -> Iterator[str]:
        """The answer as it is made; `figures` has the app's figures of it afterwards.

        Args:
            model: a path there; by default the model that is loaded, or was last.
            options: extras of the intent: max_tokens, seed, greedy, continue.

        Raises:
            DeviceError: the app is missing, refuses, ends, or the log dropped a line.
        """
        return self._lines({"prompt": prompt, "model": model}, options)

    def bench(self, model: str = "", **options: int) -> str:
        """The rows of the standard benchmark as JSONL. Options: n_prompt, n_gen, reps; raises as `ask`."""
        with self.device.awake():
            return "".join(self._lines({"model": model}, {"bench": True, **options}))

    def stop(self) -> None:
        """Ends what the app is doing."""
        self._start({}, {"stop": True})

    def logs(self) -> str:
        """What the app, and Android about its end, have written to the log."""
        return self.device.sh(
            f"logcat -d -v time -s {TAG}:V AndroidRuntime:E libc:F DEBUG:F lowmemorykiller:I"
        )

    def _lines(self, texts: dict[str, str], options: dict[str, bool | int]) -> Iterator[str]:
        if self.device.answer(f"pm path {PACKAGE}").exit_code:
            raise self.device.error("the app is not installed: gemma-edge android install")
        run = new_token()
        since = self.device.sh("date '+%m-%d %H:%M:%S.000'").strip()
        self._start({"run": run, **texts}, options)
        argv = ["sh", "-c", _READ_LOG, "sh", since]
        with LiveRun(self.device, argv, what="the log of the app") as live:
            yield from self._texts(run, live.pieces())
            if live.exit_code is not None:
                why = "the app has ended" if live.exit_code == _GONE else "the log has ended"
                raise self.device.error(f"{why} before its answer: see gemma-edge android logs")

    def _start(self, texts: dict[str, str], options: dict[str, bool | int]) -> None:
        words = ["am", "start", "-W", "-n", _ENTRY]
        for name, text in texts.items():
            words += ["--es", name, text]
        for name, value in options.items():
            words += ["--ez" if isinstance(value, bool) else "--ei", name, str(value).lower()]
        answer = self.device.answer(shlex.join(words), timeout=_START_S)
        said = (answer.text + answer.stderr).strip()
        if answer.exit_code or "Error" in said or "Exception" in said:
            raise self.device.error(f"Android does not start the app: {_why(said)}")

    def _texts(self, run: str, pieces: Iterator[bytes]) -> Iterator[str]:
        """The texts of one run, to its end; nothing more where the log ends first."""
        expected, whole, rest = 0, hashlib.sha256(), b""
        for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in map(parse_line, lines):
                if line.get("run") != run:
                    continue
                if line.get("n") != expected:
                    raise self.device.error(
                        f"the log dropped lines {expected} to {line.get('n')}: ask again, or raise its size "
                        "in Android's developer options"
                    )
                expected += 1
                if "error" in line:
                    raise self.device.error(f"the app says: {line['error']}")
                if isinstance(text := line.get("text"), str):
                    whole.update(text.encode("utf-8", "replace"))
                    yield text
                if isinstance(end := line.get("end"), dict):
                    if end.get("text_sha256") != whole.hexdigest():
                        raise self.device.error("the answer arrived changed: ask again")
                    self.figures = end
                    return


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of the app's log; {} for what is none of an answer."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _why(said: str) -> str:
    """The line that tells, of what Android's tools print."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "Failure" in line or "Error" in line or "Exception" in line]
    return (telling or lines or ["it says nothing"])[-1]


def android_app(device: object) -> AndroidApp:
    """The app on a device. Raises DeviceError where that is no phone."""
    if not isinstance(device, AdbDevice):
        raise DeviceError(
            f"{getattr(device, 'spec', device)}: the app runs on Android; expected adb or adb:SERIAL"
        )
    return AndroidApp(device)
