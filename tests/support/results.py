"""Results files in tests."""

import json
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.records.results_file import read_records


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a results file that the reader accepts too."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record.kind for record in read_records(path)] == [row["kind"] for row in rows]
    return rows
