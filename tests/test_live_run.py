"""A program on a device that is talked to while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_edge.devices import open_device
from gemma_edge.devices.live_run import LiveRun
from gemma_edge.devices.local import LocalDevice

ECHO = "trap 'echo interrupted' INT; echo ready; while read -r line; do echo \"$line\"; done; echo over"


def test_ctrl_c_ends_an_answer_and_not_the_conversation(tmp_path: Path) -> None:
    """What is typed after it still arrives."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with open_device("local") as device:
        assert isinstance(device, LocalDevice)
        with LiveRun(device, ["sh", "-c", ECHO], stdin=str(fifo)) as live, live.feed(str(fifo)) as turns:
            said = live.pieces()
            assert next(said) == b"ready\n"
            live.signal("INT")
            turns.write(b"hello\n")
            turns.flush()
            turns.close()
            assert b"".join(said).split()[-2:] == [b"hello", b"over"]
        assert live.exit_code == 0
