"""Switches off the telemetry of libraries before they load.

ONNX Runtime 1.29 and newer resolves and contacts an event collector some seconds after the first session, and
writes a database below `~/.cache/Microsoft`. It reads its variable once, when it is loaded; the call
`disable_telemetry_events()` comes too late. LiteRT and LiteRT-LM contact nobody.
"""

from __future__ import annotations

import os

# A value that the user has set, such as ORT_DISABLE_TELEMETRY=0, stays.
SILENCED = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def silence_telemetry() -> None:
    """Sets the variables for this process and its children. `gemma_edge.runtime` calls it when imported."""
    for name, value in SILENCED.items():
        os.environ.setdefault(name, value)


def offline_variables() -> dict[str, str]:
    """The variables as they are set here, for a program that does not inherit them: one on a device."""
    return {name: os.environ.get(name, value) for name, value in SILENCED.items()}
