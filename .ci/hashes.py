#!/usr/bin/env python3
"""Writes constraints-hashed.txt: the runtime and its extras as constraints.txt pins them, with SHA-256s.

pip takes hashes from requirements alone, and then wants one of everything: so this is a file of requirements.
It holds the wheels that pip chooses for Linux on x86-64 and Arm, of each Python that we support.

    python .ci/hashes.py && pip install --require-hashes -r constraints-hashed.txt
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = (17, 27, 28, 31, 34, 35)  # the manylinux tags that a wheel may have
EXTRAS = ("export", "images", "audio", "serve", "structured", "video", "completion")


def wanted() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(r for extra in EXTRAS for r in project["optional-dependencies"][extra]),
    ]


def chosen(python: str, machine: str) -> dict[str, tuple[str, str]]:
    """Name: version and hash of what pip would install there."""
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report=-",
    ]
    command += ["--target=unused", "--only-binary=:all:", f"--python-version={python}", *platforms]
    command += ["--constraint", str(ROOT / "constraints.txt"), *wanted()]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        item["metadata"]["name"]: (item["metadata"]["version"], item["download_info"]["archive_info"]["hash"])
        for item in report["install"]
    }


def main() -> None:
    hashes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for python, machine in itertools.product(PYTHONS, MACHINES):
        for name, (version, digest) in chosen(python, machine).items():
            hashes[name.lower(), version].add(digest.replace("=", ":"))
    lines = ["# Made by .ci/hashes.py: pip install --require-hashes -r constraints-hashed.txt"]
    for (name, version), digests in sorted(hashes.items()):
        lines.append(
            " \\\n".join([f"{name}=={version}", *(f"    --hash={digest}" for digest in sorted(digests))])
        )
    (ROOT / "constraints-hashed.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
