"""`gemma-edge android`, over a real adbd. pm, am, logcat and the app are stand-ins."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.benchmarks.records.rows import BenchRow
from gemma_edge.cli.main import main
from support.device_servers import Adbd, adbd_missing

# Stand in for Android's programs, and for the app: "am" writes what the app would, from /data/shim/answer.
SHIMS = {
    "pm": """\
case $1 in
  install)
    for apk; do :; done
    [ "$(head -c 2 "$apk")" = PK ] || { echo 'Failure [INSTALL_PARSE_FAILED_NOT_APK]'; exit 1; }
    touch /data/shim/installed; echo Success ;;
  path) [ -e /data/shim/installed ] && echo package:/data/app/base.apk ;;
  uninstall)
    rm /data/shim/installed 2>/dev/null && echo Success || echo 'Failure [DELETE_FAILED_INTERNAL_ERROR]' ;;
esac""",
    "am": """\
printf '%s\\n' "$@" >/data/shim/am.words
[ ! -e /data/shim/refused ] || { echo 'Error: Activity class {dev.gemmaedge} does not exist.'; exit 0; }
while [ $# -gt 0 ]; do [ "$2" != run ] || run=$3; shift; done
touch /data/shim/alive
sed "s/RUN/$run/" /data/shim/answer >>/data/shim/log
[ ! -e /data/shim/dies ] || rm /data/shim/alive
echo 'Status: ok'""",
    "logcat": """\
case $1 in -d) exec cat /data/shim/log ;; *) exec tail -n +1 -f /data/shim/log ;; esac""",
    "pidof": "[ -e /data/shim/alive ]",
}


class Phone:
    """The phone behind adbd; what "the app" says next is up to the test."""

    def __init__(self, folder: Path) -> None:
        self.adbd = Adbd(folder, megabytes=64)
        for name, text in SHIMS.items():
            (folder / "shims" / name).write_text(
                f"#!/bin/sh\n# A test's stand-in for Android's {name}.\n{text}\n"
            )
            (folder / "shims" / name).chmod(0o755)
        self.device = f"adb:{self.adbd.SERIAL}"

    def sh(self, script: str) -> str:
        return self.adbd.adb("-s", self.adbd.SERIAL, "shell", script)

    def will_say(self, *lines: dict[str, Any]) -> None:
        """The app's next lines; "n" counts them unless a line has one."""
        numbered = [{"run": "RUN", "n": n, **line} for n, line in enumerate(lines)]
        text = "".join(json.dumps(line) + "\n" for line in numbered)
        self.sh(f"cat >/data/shim/answer <<'END'\n{text}END")

    def will_answer(self, *pieces: str, **figures: object) -> None:
        digest = hashlib.sha256("".join(pieces).encode()).hexdigest()
        end = {"text_sha256": digest, **figures}
        self.will_say({"state": "loaded"}, *({"text": each} for each in pieces), {"end": end})

    def words(self) -> list[str]:
        """What am was last called with."""
        return self.sh("cat /data/shim/am.words").splitlines()


FIGURES = {
    "first_token_s": 0.5,
    "tokens_per_s": 12.0,
    "tokens": 3,
    "memory": 800_000_000,
    "peak": 1_200_000_000,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    if reason := adbd_missing():
        pytest.skip(reason)
    patch = pytest.MonkeyPatch()
    phone = Phone(tmp_path_factory.mktemp("phone"))
    for name, value in phone.adbd.environment.items():
        patch.setenv(name, value)
    yield phone
    phone.adbd.close()
    patch.undo()


@pytest.fixture
def phone(server: Phone) -> Phone:
    """With the app installed, and an empty log."""
    server.sh("cd /data/shim && rm -f refused dies alive answer && : >log && touch installed")
    return server


def android(phone: Phone, *words: str) -> int:
    return main(["android", words[0], "--device", phone.device, *words[1:]])


def test_it_installs_and_removes(phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phone.sh("rm /data/shim/installed")
    assert android(phone, "run", "Hi") == 4
    assert "the app is not installed: gemma-edge android install" in capsys.readouterr().err
    apk = tmp_path / "app.apk"
    apk.write_bytes(b"PK, as a zip file begins")
    assert android(phone, "install", "--apk", str(apk)) == 0
    phone.will_answer("ok", **FIGURES)
    assert android(phone, "run", "Hi") == 0
    assert android(phone, "uninstall") == 0
    assert android(phone, "uninstall") == 4
    assert "Failure [DELETE_FAILED_INTERNAL_ERROR]" in capsys.readouterr().err


def test_what_is_no_apk(phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.apk").write_bytes(b"something else")
    assert android(phone, "install", "--apk", str(tmp_path / "other.apk")) == 4
    assert "INSTALL_PARSE_FAILED_NOT_APK" in capsys.readouterr().err
    assert android(phone, "install", "--apk", str(tmp_path / "none.apk")) == 2
    assert "android_demo/build.sh apk" in capsys.readouterr().err
    assert phone.sh("find /data/local/tmp/gemma-edge/files -name '*.apk'") == ""


def test_a_checkout_builds_its_app(
    phone: Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    script = tmp_path / "build.sh"
    script.write_text('#!/bin/sh\nmkdir -p "${2%/*}" && echo "PK $1" >"$2"\n')
    script.chmod(0o755)
    monkeypatch.setattr("gemma_edge.cli.android.BUILD", script)
    assert android(phone, "install") == 0
    assert (tmp_path / "android" / "gemma-edge.apk").read_text() == "PK apk\n"
    (tmp_path / "android" / "gemma-edge.apk").unlink()
    script.write_text("#!/bin/sh\nexit 1\n")
    assert android(phone, "install") == 2
    assert "--apk FILE" in capsys.readouterr().err


def test_a_prompt_arrives_and_its_answer_streams(phone: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ("Air ", "scatters\n", 'blue "light" ', "überall 😀")
    phone.will_answer(*pieces, **FIGURES)
    prompt = "Why is 'the' sky\n$(blue); \"?\""
    assert android(phone, "run", prompt, "--greedy", "--max-tokens", "9") == 0
    said = capsys.readouterr()
    assert said.out == "".join(pieces) + "\n"
    assert "first token 0.50 s, 12.0 tok/s, 3 tokens; memory 800 MB, peak 1200 MB" in said.err
    words = "\n".join(phone.words())
    assert "-n\ndev.gemmaedge/dev.gemmaedge.app.FromComputer" in words
    assert f"--es\nprompt\n{prompt}" in words
    assert "--ez\ngreedy\ntrue" in words and "--ei\nmax_tokens\n9" in words


def test_a_model_is_pushed_once_and_readable(phone: Phone, tmp_path: Path) -> None:
    model = tmp_path / "small.litertlm"
    model.write_bytes(b"LITERTLM" + bytes(1000))
    assert android(phone, "push", str(model)) == 0
    there = phone.sh("find /data/local/tmp/gemma-edge/files -name small.litertlm").strip()
    assert phone.sh(f"stat -c %a {there}").strip()[-1] in "4567"
    before = phone.sh(f"stat -c '%i %Y' {there}")
    phone.will_answer("ok", **FIGURES)
    assert android(phone, "run", str(model), "Hi") == 0
    assert f"--es\nmodel\n{there}" in "\n".join(phone.words())
    assert phone.sh(f"stat -c '%i %Y' {there}") == before


def test_a_chat_goes_on(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    phone.will_answer("ok", **FIGURES)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert android(phone, "chat") == 0
    words = "\n".join(phone.words())
    assert "--es\nprompt\ntwo" in words and "--ez\ncontinue\ntrue" in words


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([{"text": "a"}, {"text": "b", "n": 5}], "dropped lines 1 to 5"),
        ([{"text": "a"}, {"end": {"text_sha256": "0"}}], "arrived changed"),
        ([{"error": "The model is damaged. Copy it again."}], "the app says: The model is damaged"),
    ],
    ids=["a gap", "another text", "a problem"],
)
def test_an_answer_that_is_none(
    phone: Phone, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]], why: str
) -> None:
    phone.will_say(*lines)
    assert android(phone, "run", "Hi") == 4
    assert why in capsys.readouterr().err


def test_an_app_that_ends_or_does_not_start(phone: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    phone.will_say({"state": "loaded"}, {"text": "half an"})
    phone.sh("touch /data/shim/dies")
    assert android(phone, "run", "Hi") == 4
    said = capsys.readouterr()
    assert said.out.startswith("half an")
    assert "the app has ended before its answer: see gemma-edge android logs" in said.err
    phone.sh("touch /data/shim/refused")
    assert android(phone, "run", "Hi") == 4
    assert "Activity class {dev.gemmaedge} does not exist" in capsys.readouterr().err
    assert android(phone, "logs") == 0
    assert "half an" in capsys.readouterr().out


def test_the_benchmark_is_appended_and_reported(
    phone: Phone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"kind": "bench", "name": "m", "time": "2026-01-01T00:00:00+00:00", "n_prompt": 512, "n_gen": 0}
    row |= {"samples_ns": [10**9, 10**9], "engine": "LiteRT-LM, app"}
    text = json.dumps(row) + "\n"
    phone.will_answer(text[:50], text[50:])
    results = tmp_path / "phone.jsonl"
    assert android(phone, "bench", "-o", str(results), "-r", "2") == 0
    assert "pp512 512.00 ± 0.00 tok/s" in capsys.readouterr().out
    words = "\n".join(phone.words())
    assert "--ez\nbench\ntrue" in words and "--ei\nreps\n2" in words
    (read,) = read_records(results)
    assert isinstance(read, BenchRow) and read.avg_ts == 512
    assert main(["report", str(results), "-o", str(tmp_path / "report.html")]) == 0
    assert "LiteRT-LM, app" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["push"],
        ["push", "model.tflite"],
        ["run"],
        ["run", "two", "prompts"],
        ["chat", "words"],
        ["install", "m.litertlm"],
        ["run", "nowhere.litertlm", "Hi"],
        ["bench", "-r", "0"],
        ["uninstall", "now"],
    ],
    ids=" ".join,
)
def test_words_that_do_not_fit(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything connects."""
    assert main(["android", *words, "--device", "adb:nowhere"]) == 2
    assert "gemma-edge: error: " in capsys.readouterr().err


def test_a_device_that_is_no_phone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["android", "logs", "--device", "local"]) == 4
    assert "the app runs on Android" in capsys.readouterr().err
