"""The campaign's past findings stay mended, and its oracle sees what it must see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz import campaign
from fuzz.campaign import judged_message
from fuzz.mutators import damaged_json, damaged_wire, parsed_wire, wire_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/clear_refs")


def in_a_process(code: str, *arguments: object) -> Any:
    """What Python code prints as JSON. Its forks hold nothing that other tests left here."""
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CORPUS = """
import json
from fuzz.corpus import read_corpus
entries, findings = read_corpus()
print(json.dumps([entries, [finding.detail for finding in findings]]))
"""


def test_no_past_finding_is_back() -> None:
    entries, findings = in_a_process(CORPUS)
    assert entries >= 10
    assert not findings


def test_the_oracle_sees_bad_messages() -> None:
    assert judged_message("fine: expected this, got that", Path("/a/b")) is None
    assert judged_message("two\nlines", Path("/a/b"))
    assert judged_message("\x1b[31m", Path("/a/b"))
    assert judged_message("x" * 2_000, Path("/a/b"))


def test_a_seed_gives_the_same_damage() -> None:
    data = {"a": [1, 2, {"b": "text"}], "c": None}
    assert repr(damaged_json(Random(5), data)) == repr(damaged_json(Random(5), data))
    assert data == {"a": [1, 2, {"b": "text"}], "c": None}


def test_a_message_is_taken_apart_and_put_together() -> None:
    raw = bytes.fromhex("089601120568656c6c6f1d0000803f")
    fields = parsed_wire(raw)
    assert fields and wire_bytes(fields) == raw
    assert damaged_wire(Random(1), raw) != raw


IN_PARTS = """
import json, sys
from pathlib import Path
from fuzz import campaign
campaign.BLOCK = 8
done = campaign.campaign_in_parts(range(700, int(sys.argv[2])), Path(sys.argv[1]), workers=1)
print(json.dumps([done.cases.total(), done.seconds]))
"""


def test_a_ledger_lets_a_campaign_go_on(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    cases, seconds = in_a_process(IN_PARTS, ledger, 712)
    assert cases == 12 and len(ledger.read_text().splitlines()) == 2
    more_cases, more_seconds = in_a_process(IN_PARTS, ledger, 716)
    assert more_cases == 16 and more_seconds > seconds
    assert [json.loads(line)["next"] for line in ledger.read_text().splitlines()] == [708, 712, 716]
    with pytest.raises(SystemExit, match="name another file"):
        campaign.campaign_in_parts(range(0, 716), ledger, workers=1)


def test_waiting_for_a_cpu_is_no_hang() -> None:
    computes = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    sleeps = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    try:
        while campaign.process_clock(computes.pid)[0] < 0.2 or not campaign.process_clock(sleeps.pid)[1]:
            time.sleep(0.05)
        watch = campaign.Watch(computes.pid, 1), campaign.Watch(sleeps.pid, 1)
        for _ in range(10):
            assert not watch[0].hangs() and not watch[1].hangs()
        assert watch[0].idle == 0 and watch[1].idle > 0
        watch[1].idle = campaign.HANG_IDLE
        watch[0].first -= campaign.HANG_CPU + 1
        assert watch[0].hangs() and watch[1].hangs()
    finally:
        computes.kill(), sleeps.kill()
        computes.wait(), sleeps.wait()
