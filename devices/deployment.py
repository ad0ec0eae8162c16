"""What `gemma-edge deploy` puts on a device, and how it is taken away again.

    ROOT/files/KEY/NAME              the bundle
    ROOT/python-KEY/                 the environment
    ROOT/cache/                      packed weights
    ROOT/deployed.json               what was deployed, for `--device` without a bundle
    ~/.local/bin/gemma-edge          runs the environment, with that bundle where no other is named
    ~/.config/systemd/user/gemma-edge.service   with `--serve`

A venv keeps away from the system's own packages, which PEP 668 protects on Debian 12 and newer.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_edge.devices.base import Progress
from gemma_edge.devices.install import Needs, environments, install
from gemma_edge.devices.push import FileDevice
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import DeviceError

MARK = "# Written by gemma-edge deploy."
UNIT = "gemma-edge.service"
# Words of the shell there.
_LAUNCHER = '"$HOME"/.local/bin/gemma-edge'
_UNITS = '"$HOME"/.config/systemd/user'
_EMPTIED = '"$HOME"/.config/systemd "$HOME"/.config "$HOME"/.local/bin "$HOME"/.local'
# Beside what lies there under names of ours, nothing is removed: the folder may be anybody's.
_OURS = "files cache runs deployed.json supervise.sh python-* run-ge*"
# A login over ssh without a terminal may lack it.
_SYSTEMCTL = "export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}; systemctl --user"


@dataclass(frozen=True)
class Deployed:
    """What a device has: the bundle's path there, or None, and what its environment needs.

    `made` are the environments that `deploy` has made, by their folders.
    """

    model: str | None
    engines: tuple[str, ...] | None
    extras: tuple[str, ...]
    made: tuple[str, ...] = ()

    @property
    def needs(self) -> Needs:
        return Needs(self.engines, self.extras)


def needs_of(bundle: Bundle | None, extras: Sequence[str] = ()) -> Needs:
    """What a bundle is run with: its engine, and the readers of what it takes beside text."""
    if bundle is None:
        return Needs(None, tuple(sorted(set(extras))))
    readers = {"vision": "images", "audio": "audio"}
    wanted = {readers[kind] for kind in bundle.modalities if kind in readers} | set(extras)
    return Needs((ARTIFACT_FORMATS[bundle.format].engine,), tuple(sorted(wanted)))


def deploy(
    device: FileDevice,
    bundle: Path | None,
    needs: Needs,
    *,
    on_runtime: Progress | None = None,
    on_bundle: Progress | None = None,
) -> Deployed:
    """Installs the runtime, sends the bundle, and puts the command `gemma-edge` there.

    Args:
        bundle: None keeps what is deployed there.

    Raises:
        DeviceError: the device cannot run it or has no room, or its `gemma-edge` is not ours.
    """
    # Before anything is sent.
    if device.answer(f"[ ! -e {_LAUNCHER} ] || grep -q {shlex.quote(MARK)} {_LAUNCHER}").exit_code:
        raise device.error("~/.local/bin/gemma-edge is there and is not ours. Remedy: move it away")
    before, had = deployed(device), environments(device)
    python = install(device, needs, on_runtime)
    model = None if bundle is None else device.push(bundle, progress=on_bundle)
    made = () if before is None else before.made
    if (venv := _environment_of(python)) not in had:
        made = (*made, venv)
    now = Deployed(model or (before.model if before else None), needs.engines, needs.extras, made)
    _write(device, f"{shlex.quote(device.root)}/deployed.json", json.dumps(asdict(now)))
    _write(device, _LAUNCHER, _launcher(device.root, python, now.model), mode="755")
    return now


def tidy(device: FileDevice, now: Deployed) -> list[str]:
    """Removes environments that `deploy` made, but for the one of the command there and those in use.

    Returns:
        The folders of other environments, which stay: `bench` and other computers may use them.

    Raises:
        DeviceError: the device is gone.
    """
    stay = []
    command = device.sh(f"cat {_LAUNCHER}")
    for venv in environments(device):
        if f"{venv}/" in command:
            continue
        # In brackets, or this very script would be found.
        pattern = f"/{venv.rpartition('/')[2][:-1]}[{venv[-1]}]/bin/"
        busy = device.answer(f"grep -qsz -e {shlex.quote(pattern)} /proc/[0-9]*/cmdline").exit_code == 0
        if busy or venv not in now.made:
            stay.append(venv)
        else:
            device.answer(f"rm -rf {shlex.quote(venv)}", timeout=300)
    return stay


def _environment_of(python: str) -> str:
    return python.removesuffix("/bin/python")


def deployed(device: FileDevice) -> Deployed | None:
    """What `deploy` put on a device; None where it has not been."""
    answer = device.answer(f"cat {shlex.quote(device.root)}/deployed.json")
    if answer.exit_code:
        return None
    try:
        said = json.loads(answer.text)
        engines = None if said["engines"] is None else tuple(map(str, said["engines"]))
        model = None if said["model"] is None else str(said["model"])
        return Deployed(
            model, engines, tuple(map(str, said["extras"])), tuple(map(str, said.get("made", ())))
        )
    except (ValueError, KeyError, TypeError):
        return None


def launcher_path(device: FileDevice) -> str:
    """Where the command is."""
    return device.sh(f"echo {_LAUNCHER}").strip("\r\n")


def environment(root: str) -> dict[str, str]:
    """The variables of our programs there: all their files stay in our folder."""
    return {"GEMMA_EDGE_CACHE": f"{root}/cache", "PYTHONUTF8": "1"}


def serve(device: FileDevice, options: Sequence[str]) -> str:
    """Starts `gemma-edge serve` as a service of the user, now and at every start; returns its state.

    Args:
        options: of `gemma-edge serve`.

    Raises:
        DeviceError: the device has no systemd for its users, or the service does not start.
    """
    if device.answer("command -v systemctl").exit_code:
        raise device.error("it has no systemd. Remedy: start ~/.local/bin/gemma-edge serve by its own init")
    _write(device, f"{_UNITS}/{UNIT}", unit(options))
    device.sh(f"{_SYSTEMCTL} daemon-reload && {_SYSTEMCTL} enable {UNIT} && {_SYSTEMCTL} restart {UNIT}")
    state = device.answer(f"sleep 2; {_SYSTEMCTL} is-active {UNIT}").text.strip()
    if state not in ("active", "activating"):
        remedy = f"journalctl --user -u {UNIT} there says why"
        raise device.error(f"{UNIT} is {state or 'not running'}. Remedy: {remedy}")
    return state


def unit(options: Sequence[str]) -> str:
    """The systemd unit; "%" and quotes are systemd's own, and are escaped."""
    words = " ".join(f'"{_escaped(word)}"' for word in options)
    return f"""\
{MARK}
[Unit]
Description=gemma-edge serve

[Service]
ExecStart=%h/.local/bin/gemma-edge serve {words}
Restart=on-failure
RestartSec=5

[Install]
WantedBy=default.target
"""


def uninstall(device: FileDevice) -> None:
    """Removes all that gemma-edge put on a device, and nothing else.

    Raises:
        DeviceError: the device is gone.
    """
    root, mark = shlex.quote(device.root), shlex.quote(MARK)
    device.sh(
        f"if [ -f {_UNITS}/{UNIT} ]; then\n"
        f"  command -v systemctl >/dev/null && {_SYSTEMCTL} disable --now {UNIT}\n"
        f"  rm -f {_UNITS}/{UNIT}\n"
        f"  command -v systemctl >/dev/null && {_SYSTEMCTL} daemon-reload\n"
        f"fi >/dev/null 2>&1\n"
        f"! grep -qs {mark} {_LAUNCHER} || rm -f {_LAUNCHER}\n"
        # Only where they are empty now.
        f"rmdir {_UNITS}/default.target.wants {_UNITS} {_EMPTIED} 2>/dev/null\n"
        f"cd {root} && rm -rf {_OURS} && cd / && {{ rmdir {root} 2>/dev/null || :; }}",
        timeout=300,
    )


def _launcher(root: str, python: str, model: str | None) -> str:
    cache = shlex.quote(f"{root}/cache")
    named = (
        "" if model is None else f": ${{GEMMA_EDGE_MODEL:={shlex.quote(model)}}}\nexport GEMMA_EDGE_MODEL\n"
    )
    return (
        f"#!/bin/sh\n{MARK}\n: ${{GEMMA_EDGE_CACHE:={cache}}}\nexport GEMMA_EDGE_CACHE\n{named}"
        f'exec {shlex.quote(python)} -m gemma_edge "$@"\n'
    )


def _write(device: FileDevice, path: str, text: str, mode: str = "644") -> None:
    """Writes a file there whole or not at all; `path` is a word of the shell."""
    script = (
        f'mkdir -p "$(dirname {path})" && cat >{path}.new && chmod {mode} {path}.new && mv {path}.new {path}'
    )
    device.sh(script, stdin=text.encode("utf-8", "surrogateescape"))


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")


def deployed_or_refuse(device: FileDevice) -> Deployed:
    """What is deployed there, with a bundle.

    Raises:
        DeviceError: nothing is.
    """
    found = deployed(device)
    if found is None or found.model is None:
        raise DeviceError(
            f"{device.spec}: no bundle is deployed there. Remedy: gemma-edge deploy BUNDLE {device.spec}, "
            "or name a bundle here"
        )
    return found
