"""One peer that is a Python library, in this process: pp and tg as llama-bench measures them.

    python -m gemma_edge.benchmarks.peers.peer_child transformers MODEL '{"n_prompt": 512, ...}' [CACHE]

prints a `PeerRun` as one JSON line. One unmeasured run of each test comes first. CACHE is the folder for
LiteRT-LM's packed weights.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.benchmarks.peers import litert_lm
from gemma_edge.benchmarks.records.measurement import Measurement, PeerRun, TurnSizes, timed
from gemma_edge.devices.script import run_script
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError, UsageError
from gemma_edge.runtime.files.typed_json import from_json, to_json

# Of none of these are there types; importing them is what this process is for.
Library = Any


def onnxruntime_genai(model: Path, sizes: TurnSizes, _: Path | None) -> list[Measurement]:
    """onnxruntime-genai: `append_tokens` prefills and picks nothing, `generate_next_token` decodes,
    greedily.
    """
    library: Library = importlib.import_module("onnxruntime_genai")
    config = library.Config(str(model))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": sizes.threads}}}}
    config.overlay(json.dumps(overlay))
    loaded = library.Model(config)
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {}

    def fresh(n_prompt: int, n_gen: int) -> None:
        params = library.GeneratorParams(loaded)
        length = n_prompt + n_gen
        params.set_search_options(max_length=length + 1, min_length=length + 1, do_sample=False)
        state["generator"] = library.Generator(loaded, params)

    def prefill() -> None:
        state["generator"].append_tokens(rng.integers(10, 1000, sizes.n_prompt).astype(np.int32))

    def begin_decode() -> None:
        fresh(1, sizes.n_gen)
        state["generator"].append_tokens(np.ones(1, np.int32))

    def decode() -> None:
        for _ in range(sizes.n_gen):
            state["generator"].generate_next_token()

    return _both(sizes, prefill, decode, lambda: fresh(sizes.n_prompt, 1), begin_decode)


def transformers(model: Path, sizes: TurnSizes, _: Path | None) -> list[Measurement]:
    """transformers in fp32 on the CPU, with its own cache: one forward call a prompt or a token."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder: nothing is asked for
    torch: Library = importlib.import_module("torch")
    library: Library = importlib.import_module("transformers")
    torch.set_num_threads(sizes.threads)
    loaded = library.Gemma3nForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    vocabulary = loaded.config.get_text_config().vocab_size_per_layer_input
    state: dict[str, Any] = {"cache": None}

    def forward(n_tokens: int) -> None:
        ids = torch.randint(vocabulary, (1, n_tokens))
        with torch.inference_mode():
            result = loaded(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["cache"] = result.past_key_values

    def decode() -> None:
        for _ in range(sizes.n_gen):
            forward(1)

    def fresh() -> None:
        state["cache"] = None

    return _both(sizes, lambda: forward(sizes.n_prompt), decode, fresh, fresh)


def _litert_lm(model: Path, sizes: TurnSizes, cache: Path | None) -> list[Measurement]:
    if cache is None:
        raise UsageError("litert-lm needs a folder for its packed weights")
    return litert_lm.measure(model, sizes, cache)


def _both(
    sizes: TurnSizes,
    prefill: Callable[[], None],
    decode: Callable[[], None],
    before_prefill: Callable[[], None],
    before_decode: Callable[[], None],
) -> list[Measurement]:
    """Each test that is asked for, after one run that is not measured."""
    tests = []
    if sizes.n_prompt:
        samples = timed(prefill, sizes.reps + 1, before_prefill)
        tests.append(Measurement(sizes.n_prompt, 0, samples[1:]))
    if sizes.n_gen:
        samples = timed(decode, sizes.reps + 1, before_decode)
        tests.append(Measurement(0, sizes.n_gen, samples[1:]))
    return tests


# Peer: the package whose version is told, and what measures with it.
PEERS: dict[str, tuple[str, Callable[[Path, TurnSizes, Path | None], list[Measurement]]]] = {
    "litert-lm": ("litert-lm-api", _litert_lm),
    "onnxruntime-genai": ("onnxruntime-genai", onnxruntime_genai),
    "transformers": ("transformers", transformers),
}


def main() -> int:
    if not 4 <= len(sys.argv) <= 5:
        raise UsageError("expected a peer, its model, the JSON of sizes, and perhaps a cache folder")
    peer, path, sizes = sys.argv[1], Path(sys.argv[2]), from_json(TurnSizes, json.loads(sys.argv[3]))
    cache = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    sizes.check()
    package, measure = PEERS[peer]
    # The libraries write to stdout, natively: what they say goes to stderr, and stdout is for the answer.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        tests = measure(path, sizes, cache)
    except GemmaEdgeError:
        raise
    except Exception as error:  # whatever a library raises is this peer's failure, in one line
        raise DeviceError(f"{type(error).__name__}: {error}".replace("\n", " ")[:500]) from None
    try:
        build = f"{package} {version(package)}"
    except PackageNotFoundError:
        build = package
    answer = to_json(PeerRun(tuple(tests), 0, build, path.name))
    os.write(stdout, (json.dumps(answer) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
