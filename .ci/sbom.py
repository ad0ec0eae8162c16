#!/usr/bin/env python3
"""Writes a software bill of materials for a wheel, as CycloneDX 1.6 JSON, to stdout.

    python .ci/sbom.py dist/gemma_edge-0.1.0-py3-none-any.whl > sbom.json

The component is the wheel with its SHA-256, its parts are its files with theirs, as RECORD has them; its
dependencies are those of its metadata, with the versions of constraints-hashed.txt. The same wheel gives the
same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import uuid
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

HASHED = Path(__file__).parent.parent / "constraints-hashed.txt"


def pins() -> dict[str, tuple[str, list[str]]]:
    """Name: version and SHA-256s."""
    found = {}
    for entry in re.split(r"\n(?=\S)", HASHED.read_text()):
        if match := re.match(r"([\w.-]+)==(\S+)", entry):
            found[match[1].lower()] = match[2], re.findall(r"sha256:([0-9a-f]{64})", entry)
    return found


def bill(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = HeaderParser().parsestr(
            wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        )
        record = wheel.read(next(n for n in names if n.endswith(".dist-info/RECORD"))).decode().splitlines()
    files = []
    for name, hashed, _ in (line.rsplit(",", 2) for line in record):
        if hashed:
            raw = base64.urlsafe_b64decode(hashed.partition("=")[2] + "==")
            files.append({"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": raw.hex()}]})
    known, parts = pins(), []
    for requirement in metadata.get_all("Requires-Dist") or []:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if (extra and extra[1] in ("dev", "all")) or any(part["name"] == name for part in parts):
            continue
        part: dict[str, Any] = {"type": "library", "name": name, "scope": "optional" if extra else "required"}
        version, _ = next(((v, h) for n, (v, h) in known.items() if n.replace("_", "-") == name), ("", []))
        if version:
            part |= {"version": version, "purl": f"pkg:pypi/{name}@{version}"}
        parts.append(part)
    name, version = metadata["Name"], metadata["Version"]
    purl = f"pkg:pypi/{name}@{version}"
    component = {"type": "application", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    component["licenses"] = [{"license": {"id": "Apache-2.0"}}]
    component["hashes"] = [{"alg": "SHA-256", "content": digest}]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {"component": {**component, "components": files}},
        "components": parts,
    }


if __name__ == "__main__":
    print(json.dumps(bill(Path(sys.argv[1])), indent=1))
