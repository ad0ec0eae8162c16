"""`gemma-edge doctor`: what facts mean.

The machines below were written from what such boards' /proc and /sys hold; none of them ran these tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_edge.benchmarks.measure.planned_machine import described_machine
from gemma_edge.cli.doctor import fits
from gemma_edge.cli.main import main
from gemma_edge.devices.base import DeviceFacts
from gemma_edge.devices.doctor import cannot_install, examine, judge_need
from gemma_edge.devices.facts import parse_facts
from gemma_edge.devices.known_devices import formats_for
from gemma_edge.export.device_plans import Wishes, rank_plans

A72 = "fp asimd evtstrm crc32 cpuid"
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
PI_CGROUPS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t0\t80\t1\nmemory\t0\t80\t0\n"


def machine(
    *,
    arch: str = "aarch64",
    flags: str = A76,
    memory_kb: int = 8_000_000,
    available_kb: int = 7_000_000,
    libc: str = "glibc 2.41",
    python: str = "3.13.5 python3 64",
    **sections: str,
) -> DeviceFacts:
    """Facts of an ordinary board, as probe.sh tells them, with other sections where given."""
    shown = {
        "uname": f"Linux\n6.12.47\n{arch}\nboard",
        "cpuinfo": "".join(f"processor : {core}\nFeatures : {flags}\n" for core in range(4)),
        "meminfo": f"MemTotal: {memory_kb} kB\nMemAvailable: {available_kb} kB",
        "df": "Filesystem 1024-blocks Used Available Capacity\n/dev/root 60000000 9000000 50000000 16%",
        "python": python,
        "libc": libc,
        "bits": "64",
        "page": "4096",
        "cgroups": PI_CGROUPS.replace("memory\t0\t80\t0", "memory\t0\t80\t1"),
        "controllers": "cpuset cpu io memory pids",
        **{name.replace("_", "-"): text for name, text in sections.items()},
    }
    text = "".join(f"### {name}\n{value}\n" for name, value in shown.items())
    return parse_facts(text, spec="ssh://board", kind="ssh")


PI_4 = machine(
    flags=A72,
    memory_kb=3_880_000,
    available_kb=3_500_000,
    libc="glibc 2.36",
    python="3.11.2 python3 64",
    model="Raspberry Pi 4 Model B Rev 1.5",
    cgroups=PI_CGROUPS,
    controllers="cpuset cpu io pids",
    boot="/boot/firmware/cmdline.txt",
    throttled="50005",
    swaps="Filename Type Size Used Priority\n/var/swap file 524272 204800 -2",
    thermal="/sys/class/thermal/thermal_zone0/type:cpu-thermal\n/sys/class/thermal/thermal_zone0/temp:84200",
)
PI_5 = machine(
    model="Raspberry Pi 5 Model B Rev 1.0",
    page="16384",
    throttled="throttled=0x0",
    swaps="Filename Type Size Used Priority\n/dev/zram0 partition 2097136 900000 100",
    thermal="/sys/class/thermal/thermal_zone0/type:cpu-thermal\n/sys/class/thermal/thermal_zone0/temp:52350",
    engines="python-0123/lib/python3.13/site-packages/ai_edge_litert-2.3.0.dist-info",
)
# JetPack 6 is Ubuntu 22.04, whose python3 is 3.10.
JETSON = machine(
    flags=f"{A76} uscat ilrcpc flagm",
    model="NVIDIA Jetson Orin Nano Developer Kit",
    libc="glibc 2.35",
    python="3.10.12 python3 64",
    governor="/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor:schedutil",
)
X86 = replace(
    machine(arch="x86_64"),
    cpu="Intel(R) Xeon(R)",
    cpu_flags=("avx", "avx2", "avx512_vnni", "amx_int8"),
)
OLD_X86 = replace(X86, cpu_flags=())


def verdicts(facts: DeviceFacts) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in examine(facts)}


def remedy(facts: DeviceFacts, name: str) -> str:
    return next(finding.remedy for finding in examine(facts) if finding.name == name)


def test_a_pi_4() -> None:
    found = verdicts(PI_4)
    assert found["processor"] == found["libc"] == found["Python"] == "ok"
    assert found["ONNX Runtime"] == "slow"
    assert found["LiteRT"] == found["LiteRT-LM"] == found["memory limits"] == "missing"
    assert found["swap"] == "slow"
    assert "cgroup_enable=memory" in remedy(PI_4, "memory limits")
    assert "/boot/firmware/cmdline.txt" in remedy(PI_4, "memory limits")
    assert PI_4.throttled == ("under-voltage", "throttled")
    assert "power supply" in remedy(PI_4, "temperature")
    assert formats_for(PI_4.system, PI_4.arch, PI_4.cpu_flags)[0] == "onnx"
    assert cannot_install(PI_4) is None


def test_a_pi_5_with_pages_of_16_kib() -> None:
    assert set(verdicts(PI_5).values()) == {"ok"}
    assert PI_5.page_bytes == 16384 and PI_5.zram
    assert formats_for(PI_5.system, PI_5.arch, PI_5.cpu_flags)[0] == "tflite"


def test_a_jetson_with_an_old_python() -> None:
    found = verdicts(JETSON)
    assert found["LiteRT"] == "ok" and found["Python"] == "missing"
    assert "python3.11" in remedy(JETSON, "Python")
    mended = machine(python="3.10.12 python3 64\n3.11.0 python3.11 64")
    assert (mended.python, mended.python_program) == ("3.11.0", "python3.11")
    assert verdicts(mended)["Python"] == "ok"


def test_x86_with_and_without_instructions() -> None:
    assert verdicts(X86)["ONNX Runtime"] == verdicts(X86)["LiteRT"] == "ok"
    assert verdicts(OLD_X86)["ONNX Runtime"] == "slow" and verdicts(OLD_X86)["LiteRT"] == "missing"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (machine(arch="armv7l", bits="32"), "processor"),
        # Raspberry Pi OS of 32 bits boots a 64-bit kernel on a Pi 4.
        (machine(python="3.11.2 python3 32", bits="32"), "processor"),
        (machine(arch="riscv64"), "processor"),
        (machine(libc="musl libc (aarch64)"), "libc"),
        (machine(libc="glibc 2.27"), "libc"),
        (machine(python=""), "Python"),
        (machine(python="3.9.2 python3 64"), "Python"),
    ],
)
def test_nothing_can_be_installed(facts: DeviceFacts, name: str) -> None:
    found = cannot_install(facts)
    assert found is not None and found.name == name and found.remedy


def test_a_machine_that_tells_nothing() -> None:
    assert all(finding.line() for finding in examine(parse_facts("", spec="ssh://x", kind="ssh")))


def test_what_a_bundle_needs() -> None:
    sizes = [1 << 30, 3 << 30 | 600 << 20, 8 << 30]
    assert [judge_need(PI_4, "out", size, "less").verdict for size in sizes] == ["ok", "slow", "missing"]


@pytest.mark.slow
def test_recipes_that_fit(tiny_checkpoint: Path) -> None:
    small, large = (replace(PI_5, memory_available_bytes=size) for size in (1 << 20, 4 << 30))
    assert [finding.verdict for finding in fits(small, str(tiny_checkpoint))] == ["missing"]
    found = list(fits(large, str(tiny_checkpoint)))
    # As `plan` ranks them.
    plans = rank_plans(str(tiny_checkpoint), described_machine(large), Wishes())
    assert found[0].found.startswith(" ".join(plans[0].options()))
    assert [re.search(r"--recipe (\w+)", each.found)[1] for each in found[:3]] == ["fp32", "int8", "int4_g32"]  # type: ignore[index]
    assert found[-1].found == f"{len(plans) - 3} more plans" and "gemma-edge plan" in found[-1].remedy


@pytest.mark.slow
def test_this_machine(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    assert main(["doctor", str(tiny_bundle), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"processor", "memory", "engines", "fits"} <= {each["name"] for each in said["findings"]}
    assert main(["doctor", "--device", "ssh://-oProxyCommand=x"]) == 2
