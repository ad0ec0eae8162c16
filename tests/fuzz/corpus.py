"""Past findings, kept as the damaged files themselves: JSON with a subject and its changed files.

Seeds would not do: they mean other damage once a mutator or a valid file has changed.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from .campaign import Finding, Reader, draw, valid_files
from .subjects import Files, subjects

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 20_000


def keep(seed: int, only: Sequence[str], name: str) -> Path:
    """Writes the case of a seed to the corpus."""
    with valid_files():
        subject, rng = draw(seed, only)
        changed = subject.damage(rng, subject.valid())
    path = CORPUS / f"{name}.json"
    path.write_text(entry(subject.name, changed), encoding="utf-8")
    if path.stat().st_size > MOST_BYTES:
        path.unlink()
        raise SystemExit(f"{name}: more than {MOST_BYTES} bytes: keep it as a test")
    return path


def entry(subject: str, changed: Files) -> str:
    files = {name: base64.b85encode(zlib.compress(data, 9)).decode() for name, data in changed.items()}
    return json.dumps({"subject": subject, "files": files}) + "\n"


def read_corpus() -> tuple[int, list[Finding]]:
    """How many entries there are, and those that are findings again; a child reads them, which may crash."""
    entries = sorted(CORPUS.glob("*.json"))
    with valid_files() as folder:
        notes = folder / "corpus.jsonl"
        notes.touch()
        if (child := os.fork()) == 0:
            code = 70
            try:
                with notes.open("a", encoding="utf-8", buffering=1) as out:
                    reader = Reader(folder / "corpus")
                    for number, path in enumerate(entries):
                        out.write(json.dumps([path.name, read_entry(reader, number, path)]) + "\n")
                code = 0
            finally:
                os._exit(code)
        code = os.waitpid(child, 0)[1]
        read = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    findings = [
        Finding(n, "corpus", "again", f"{name}: {text}") for n, (name, text) in enumerate(read) if text
    ]
    if code:
        text = f"{entries[len(read)].name}: the reader ended with status {code}"
        findings.append(Finding(len(read), "corpus", "crash", text))
    return len(entries), findings


def read_entry(reader: Reader, number: int, path: Path) -> str:
    """What is wrong again, or nothing."""
    data = json.loads(path.read_text(encoding="utf-8"))
    subject = subjects()[data["subject"]]
    changed = {name: zlib.decompress(base64.b85decode(text)) for name, text in data["files"].items()}
    here, valid = reader.place(subject)
    finding, _ = reader.judge(number, subject, here, valid, changed)
    return f"{finding.kind}: {finding.detail}" if finding else ""
