"""Memory that is left, as the kernel tells in files of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_edge.runtime.host.available_memory import available_memory

MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in {
        "proc/meminfo": f"MemTotal: 999999 kB\nMemAvailable: {4096 << 10} kB\n",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc", root / "groups"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 4096),
        ({"proc/self/cgroup": "0::/\n"}, 4096),
        (
            {
                "proc/self/cgroup": "0::/user/one\n",
                "groups/user/one/memory.max": f"{2048 * MIB}\n",
                "groups/user/one/memory.stat": f"anon {1900 * MIB}\nfile {900 * MIB}\n",
            },
            148,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/one\n",
                "groups/user/one/memory.max": "max\n",
                "groups/user/memory.max": f"{1000 * MIB}\n",
                "groups/user/memory.stat": f"anon {990 * MIB}\n",
            },
            10,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
                "groups/memory/box/memory.limit_in_bytes": f"{512 * MIB}\n",
                "groups/memory/box/memory.stat": f"cache 7\ntotal_rss {500 * MIB}\n",
            },
            12,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/of/the/host\n",
                "groups/memory/memory.limit_in_bytes": f"{64 * MIB}\n",
                "groups/memory/memory.stat": f"total_rss {80 * MIB}\n",
            },
            0,
        ),
        ({"proc/self/cgroup": "0::/a\n", "groups/a/memory.max": "nonsense\n"}, 4096),
    ],
    ids=["no_groups", "no_limit", "v2", "v2_parent", "v1", "container_above_its_limit", "nonsense"],
)
def test_the_least_of_what_is_left(files: dict[str, str], left: int, tmp_path: Path) -> None:
    assert available_memory(*write(tmp_path, files)) == left * MIB


def test_where_nobody_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
    assert available_memory(tmp_path, tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc")
def test_here() -> None:
    left = available_memory()
    assert left is not None and 0 < left < 1 << 50
