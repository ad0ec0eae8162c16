"""The campaign's past findings stay mended, and its oracle sees what it must see."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
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
