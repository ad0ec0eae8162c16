"""The campaign's past findings stay mended, and its oracle sees what it must see."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from fuzz import campaign
from fuzz.campaign import judged_message
from fuzz.corpus import read_corpus
from fuzz.mutators import damaged_json, damaged_wire, parsed_wire, wire_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/clear_refs")


def test_no_past_finding_is_back() -> None:
    entries, findings = read_corpus()
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


def test_a_ledger_lets_a_campaign_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "BLOCK", 8)
    ledger, said = tmp_path / "ledger.jsonl", []
    first = campaign.campaign_in_parts(range(700, 712), ledger, workers=1, log=said.append)
    assert first.cases.total() == 12 and len(ledger.read_text().splitlines()) == 2
    whole = campaign.campaign_in_parts(range(700, 716), ledger, workers=1, log=said.append)
    assert whole.cases.total() == 16 and whole.seconds > first.seconds
    assert [json.loads(line)["next"] for line in ledger.read_text().splitlines()] == [708, 712, 716]
    with pytest.raises(SystemExit, match="name another file"):
        campaign.campaign_in_parts(range(0, 716), ledger, workers=1, log=said.append)


def test_waiting_for_a_cpu_is_no_hang() -> None:
    computes = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    sleeps = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
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
