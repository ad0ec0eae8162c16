"""A board from deploy to uninstall, emulated: aarch64, a real sshd, and the answers of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_edge.export.exporter import export_bundle
from support.emulated_board import EmulatedBoard, board_missing

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
QUESTION = "I have a question. Who are you?"
# `serve`, from its start to its end, by the board's own Python.
ASK = """
import json, signal, subprocess, sys, urllib.request
server = subprocess.Popen([sys.argv[1], "serve", "--port", "8123"], stderr=subprocess.PIPE, text=True)
while "answers with" not in server.stderr.readline():
    pass
body = {"messages": [{"role": "user", "content": sys.argv[2]}], "temperature": 0, "max_tokens": 24}
head = {"Content-Type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8123/v1/chat/completions", json.dumps(body).encode(), head)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
server.send_signal(signal.SIGTERM)
sys.exit(server.wait())
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket in fp32, for ONNX Runtime: its logits hardly depend on the CPU."""
    folder = tmp_path_factory.mktemp("bundle") / "pocket"
    return export_bundle(POCKET, folder, recipe="fp32", context=256, modalities=["text"], verify=False).path


@pytest.fixture(params=["cortex-a76", "cortex-a72"])
def board(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedBoard]:
    if reason := board_missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="board-", dir="/run") as folder:
        server = EmulatedBoard(Path(folder), request.param)
        server.start()
        monkeypatch.setenv("GEMMA_EDGE_SSH_CONFIG", str(server.config))
        yield server
        server.kill()


def gemma_edge(*words: object, stdin: str = "") -> str:
    argv = [sys.executable, "-m", "gemma_edge", *map(str, words)]
    done = subprocess.run(argv, input=stdin, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_deploy_to_uninstall(board: EmulatedBoard, bundle: Path) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "24")
    gemma_edge("deploy", bundle, board.url, "--extra", "serve")
    facts = json.loads(gemma_edge("doctor", "--device", board.url, "--json"))
    verdicts = {each["name"]: each["verdict"] for each in facts["findings"]}
    newer = "asimddp" in facts["facts"]["cpu_flags"]
    assert facts["facts"]["arch"] == "aarch64"
    assert verdicts["ONNX Runtime"] == ("ok" if newer else "slow")
    assert verdicts["LiteRT-LM"] == ("ok" if newer else "missing")

    def tokens(*words: object) -> list[int]:
        said = json.loads(gemma_edge("run", *words, "--json", "--logprobs", "0", *greedy, QUESTION))
        return [each["id"] for each in said["logprobs"]]

    assert tokens("--device", board.url) == tokens(bundle) != []
    turns = "What is 2 + 3?\nWho are you?\n"
    here = gemma_edge("chat", bundle, *greedy, stdin=turns)
    assert gemma_edge("chat", "--device", board.url, *greedy, stdin=turns) == here
    ssh = ["ssh", "-F", str(board.config), "-p", str(board.port), "root@127.0.0.1"]
    command = f"python3 - {board.folder}/home/.local/bin/gemma-edge '{QUESTION}'"
    served = subprocess.run([*ssh, command], input=ASK, capture_output=True, encoding="utf-8")
    assert served.returncode == 0, served.stderr
    assert served.stdout == gemma_edge("run", bundle, *greedy, QUESTION)
    gemma_edge("deploy", board.url, "--uninstall")
    assert list((board.folder / "home").rglob("*")) == []
