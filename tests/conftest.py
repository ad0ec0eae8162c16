"""Fixtures that several test files share: what is slow to make is made once a session."""

from __future__ import annotations

import functools
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from gemma_edge.cli.main import main
from gemma_edge.devices.ssh import SshDevice
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from support.device_servers import Sshd, sshd_missing
from support.http_server import ServerProcess, serving
from support.native_build import build_runner
from support.random_gemma3n_text import (
    VARIANTS,
    LiveCase,
    random_ids,
    random_source,
    transformers_logits,
    transformers_model,
)
from support.tiny_tokenizer import tiny_tokenizer

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"

# How long a machine takes says nothing about an example.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell's background job ignores Ctrl-C, one of nohup a hang-up; so would what a test starts and ends.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])


@pytest.fixture(autouse=True)
def _no_signal_stays_blocked() -> Iterator[None]:
    """What a test blocks, the programs of every later test would inherit."""
    yield
    assert not signal.pthread_sigmask(signal.SIG_SETMASK, []), "the test left signals blocked"


# What makes a test slow: its file, a fixture, or a name that tells of another program or of true size. A
# single test says so itself, with `@pytest.mark.slow`.
SLOW_FILES = frozenset(
    f"test_{name}"
    for name in """
    bench bench_devices bench_encode bench_peers bench_prefix bench_speculation decode_cost demo
    devices_shell devices_supervise
    distribution encoder_export end_to_end export_format exporter first_hour fuzz_corpus leaks litert_decoder
    litert_torch litertlm_bundle litertlm_encoders multimodal native_runner offline optimum packed_weights
    step_profile packed_graph
    parity pocket pocket_lessons pocket_verbs release synth_checkpoint templates_that_fill_memory
    tflite_encoders turn_editor completion litertlm_tools structured_engines
    emulated_board native_answers
    applications serve serve_clients serve_load page_chat page_attachments page_markdown page_faults
    page_tabs speculation_engines adapters graph_check tune image_sizes fine_tuning
    """.split()
)
SLOW_FIXTURES = frozenset(
    (
        "adb_server",
        "apk",
        "board",
        "browser",
        "desk",
        "device_url",
        "gate_bundles",
        "live_case",
        "pocket_bundles",
        "served",
        "served_onnx",
        "server",
        "sshd",
    )
)
SLOW_NAMES = re.compile(
    r"transformers|timm|litert_lm|true_size|test_live|processor|browser|full_disk|_is_ended_cleans_up|flipped_bit|"
    r"three_hours|random_bytes|killed_before_every|safetensors_library|192_|repeats_one_table|on_any_text|"
    r"_logits_are_the_references\[(?!as_it_is)"
)
WITHOUT_FAST = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks every test as `slow` or `fast`, before -m selects."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if item.path.stem in SLOW_FILES or SLOW_FIXTURES & fixtures or SLOW_NAMES.search(item.name):
            item.add_marker("slow")
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")
    fast = {item.path.stem for item in items if item.get_closest_marker("fast")}
    config.stash[WITHOUT_FAST] = {item.path.stem for item in items} - fast


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line: its exit code, and what it wrote to stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def live_case() -> Callable[[str], LiveCase]:
    """The case of a name in VARIANTS. Skips without torch and transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    @functools.cache
    def case(name: str) -> LiveCase:
        source = random_source(**VARIANTS[name])
        ids = random_ids(source.config, 24)
        return LiveCase(source, ids, transformers_logits(transformers_model(VARIANTS[name], source), ids))

    return case


@pytest.fixture(scope="module")
def device_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """This machine behind ssh, with this interpreter as its Python."""
    if reason := sshd_missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("device")
    sshd = Sshd(folder)
    sshd.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_EDGE_SSH_CONFIG", str(sshd.config))
        # What makes an environment on a device is tested with the devices.
        patch.setattr(SshDevice, "python", lambda _: sys.executable)
        yield f"{sshd.url}{folder}/device"
    sshd.kill()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny synthetic checkpoint, multimodal layout. Not to be changed: copy it first."""
    return synthesize(tmp_path_factory.mktemp("checkpoint") / "tiny", progress=False).path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` at int4, not calibrated, verified, context 256. Not to be changed: copy it first."""
    return export_bundle(
        tiny_checkpoint,
        tmp_path_factory.mktemp("bundle") / "int4",
        recipe="int4",
        context=256,
        chunk=64,
        calibrate="none",
    ).path


@pytest.fixture(scope="session")
def exact_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` at fp32, whose logits hardly depend on the CPU, context 256. Not to be changed."""
    folder = tmp_path_factory.mktemp("bundle") / "fp32"
    return export_bundle(tiny_checkpoint, folder, recipe="fp32", context=256, chunk=64, verify=False).path


@pytest.fixture(scope="session", params=["onnx", "tflite"])
def engine_bundle(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_checkpoint` at int8, not verified, context 400, for each engine in turn. Not to be changed."""
    out = tmp_path_factory.mktemp("engine") / request.param
    return export_bundle(
        tiny_checkpoint, out, recipe="int8", context=400, verify=False, format=request.param
    ).path


@pytest.fixture(scope="session")
def gate_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers with every mechanism, untied, so that the token embeddings are a table of their own."""
    kinds = ["sliding_attention", "full_attention"]
    config: dict[str, Any] = {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", *kinds, *kinds],
        "intermediate_size": [256] * 5,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.9, 0.0],
        "tie_word_embeddings": False,
    }
    return synthesize(tmp_path_factory.mktemp("gate") / "checkpoint", config=config, progress=False).path


@pytest.fixture(scope="session")
def gate_bundles(gate_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`gate_source` at int4, neither calibrated nor verified, by format. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("gate")
    options: dict[str, Any] = {"recipe": "int4", "context": 64, "chunk": 16}
    options |= {"verify": False, "calibrate": "none"}
    return {
        form: export_bundle(gate_source, folder / name, format=form, **options).path
        for form, name in (("onnx", "onnx"), ("tflite", "tflite"), ("litertlm", "made.litertlm"))
    }


@pytest.fixture(scope="session")
def pocket_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pocket at int4, not calibrated, context 512, for each engine. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("pocket")
    options: dict[str, Any] = {"recipe": "int4", "context": 512, "verify": False, "calibrate": "none"}
    return {
        form: export_bundle(POCKET, folder / f"pocket-{form}", format=form, **options).path
        for form in ("onnx", "tflite")
    }


@pytest.fixture(scope="session")
def linux_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the native runner, built for this machine."""
    return build_runner("linux", tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="session", params=["onnx", "tflite"])
def served(request: pytest.FixtureRequest, pocket_bundles: dict[str, Path]) -> Iterator[ServerProcess]:
    """`gemma-edge serve` over Pocket, whose name is "pocket"."""
    with serving(pocket_bundles[request.param], "--name", "pocket", brakes=True) as process:
        yield process


@pytest.fixture(scope="session")
def served_onnx(pocket_bundles: dict[str, Path]) -> Iterator[ServerProcess]:
    """The same, on one engine, for what does not depend on it."""
    with serving(pocket_bundles["onnx"], "--name", "pocket", "--degraded-after", "600s") as process:
        yield process
