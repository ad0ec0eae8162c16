r"""The peer: llama.cpp's llama-bench on the same checkpoint.

A GGUF file is made from a checkpoint, a synthetic one included, with llama.cpp's own tools. The wheel of
llama-cpp-python 0.3.36 brings no llama-bench, but its source distribution holds all of llama.cpp:

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_SERVER=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__
    cmake --build build -j2 --target llama-bench llama-quantize
    python convert_hf_to_gguf.py CKPT --outtype bf16 --outfile model-bf16.gguf
    build/bin/llama-quantize model-bf16.gguf model-q4_0.gguf Q4_0
    build/bin/llama-bench -m model-q4_0.gguf -p 512 -n 64 -r 5 -t 2 -o json

AMX is off because no phone and no board has it (the switches GGML_AMX_* do nothing in a native build:
-march=native defines the macro that the code asks for). The conversion needs torch, transformers,
sentencepiece, protobuf, PyYAML and tqdm; `gguf` is beside the script. `Q4_0` keeps token embeddings, which
are the head, and the per-layer table at Q6_K; AltUp, Laurel and the per-layer model projection stay at bf16.

What the conversion and llama.cpp ask of the checkpoint:
- `architectures`: Gemma3nForConditionalGeneration or Gemma3nForCausalLM, tensors in the layout of either;
- `tokenizer.model` (SentencePiece with byte fallback). It may have fewer pieces than `vocab_size`, the
  rest becomes unused padding; rows of both tables are padded with zeros up to `vocab_size`;
- k_proj, v_proj and k_norm of **every** layer, those that share KV included, as the published files have
  them: without them the GGUF is made, and refused when it is loaded;
- in config.json: altup_num_inputs, layer_types, activation_sparsity_pattern, max_position_embeddings,
  sliding_window, num_kv_shared_layers written out;
- what llama.cpp has fixed in its code: 20 layers that own KV, sparsity 0.95 in the first 10, 4 AltUp
  streams, Laurel rank 64, 256 per-layer values, one feed-forward width for all layers.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_edge.benchmarks.records.measurement import Measurement, PeerRun, TurnSizes
from gemma_edge.devices.machine.child import ChildError, run_child
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import from_json

ENVIRONMENT_VARIABLE = "GEMMA_EDGE_LLAMA_BENCH"
NAME = "llama-bench"


def find_llama_bench(given: str | Path | None = None) -> Path | None:
    """The program to run: the one given, else GEMMA_EDGE_LLAMA_BENCH's, else llama-bench on the PATH.

    Returns:
        None when nothing was asked for and nothing is installed.

    Raises:
        UsageError: the one that was asked for cannot be run.
    """
    asked = given or os.environ.get(ENVIRONMENT_VARIABLE)
    found = shutil.which(str(asked or NAME))
    if asked and not found:
        remedy = f"Point --llama-bench or {ENVIRONMENT_VARIABLE} to llama-bench."
        raise UsageError(f"{asked} is not a program that can be run. {remedy}")
    return Path(found) if found else None


@dataclass(frozen=True)
class _Row(Measurement):
    """A test as llama-bench prints it."""

    build_commit: str | None = None
    build_number: int | None = None
    model_type: str | None = None


def run_llama_bench(binary: Path, gguf: Path, sizes: TurnSizes, *, timeout: float | None = None) -> PeerRun:
    """Runs llama-bench once; it warms up by itself.

    Raises:
        ChildError: it failed. DeviceError: it cannot be started, hangs, or prints something else.
    """
    argv = [str(binary), "-m", str(gguf), "-o", "json"]
    argv += ["-p", str(sizes.n_prompt), "-n", str(sizes.n_gen)]
    argv += ["-r", str(sizes.reps), "-t", str(sizes.threads)]
    run = run_child(argv, timeout=timeout)
    if run.exit_code:
        raise ChildError(NAME, run)
    return replace(parse_output(run.stdout), peak_rss=run.peak.high_water)


def parse_output(text: str) -> PeerRun:
    """The run in the output of `-o json`, without its memory.

    Raises:
        DeviceError: the text is no such output.
    """
    try:
        rows = from_json(list[_Row], json.loads(text))
        first = rows[0]
    except (IndexError, ValueError, RecursionError) as error:
        raise DeviceError(f"{NAME} printed no JSON of its kind ({error!r}): {text[:200]!r}") from None
    tests = tuple(Measurement(row.n_prompt, row.n_gen, row.samples_ns, row.n_depth) for row in rows)
    return PeerRun(tests, 0, f"{first.build_commit} ({first.build_number})", str(first.model_type))
