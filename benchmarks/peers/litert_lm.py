"""The peer on a .litertlm: Google's LiteRT-LM, from the package `litert-lm-api`, timed by itself.

Its `Benchmark` is not used: that one applies the prompt template, so it prefills a second time for the
model's turn, tells the speed of this second, warmer prefill, decodes behind both, and makes a new engine
for every figure. Here an engine is loaded for a test, and each repetition is a new session of it, as the
tests of the others are:

- `pp512`: 512 tokens prefilled into an empty cache, then one decoded, which is not counted;
- `tg64`: 64 tokens decoded after a prompt of one token. It samples and makes text meanwhile, which cannot be
  left out: of one candidate, the cheapest way.

`measure` runs in a process of its own (`peer_child`): the engine logs a page for every model, and it aborts
where others raise.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.records.measurement import Measurement, TurnSizes
from gemma_edge.runtime.errors import DeviceError

PROMPT = b"The"  # filled up or cut by the engine to the tokens asked for
TOP_P = 2  # LiteRtLmSamplerType; the greedy one is not implemented, so this one chooses among 1
# A C library without types, behind the package's own declarations of its functions.
Library = Any


def measure(path: Path, sizes: TurnSizes, cache: Path) -> list[Measurement]:
    """Prefill and decode, each `sizes.reps` times after one that is not counted.

    Args:
        cache: the folder of the packed weights. An empty one is filled, and the memory this takes is used.

    Raises:
        DeviceError: the engine refuses the model, or counts other tokens than were asked for.
    """
    tests = []
    if sizes.n_prompt:
        samples = _samples(path, sizes, cache, sizes.n_prompt, 1)
        tests.append(Measurement(sizes.n_prompt, 0, tuple(prefill for prefill, _ in samples)))
    if sizes.n_gen:
        samples = _samples(path, sizes, cache, 1, sizes.n_gen)
        tests.append(Measurement(0, sizes.n_gen, tuple(decode for _, decode in samples)))
    return tests


def _samples(path: Path, sizes: TurnSizes, cache: Path, n_prompt: int, n_gen: int) -> list[tuple[int, int]]:
    """Nanoseconds of prefill and of decode, of each repetition."""
    library: Library = importlib.import_module("litert_lm._ffi")._get_lib()
    with _engine(library, path, sizes.threads, cache, n_prompt, n_gen) as engine:
        return [_session(library, engine, n_prompt, n_gen) for _ in range(sizes.reps + 1)][1:]


@contextmanager
def _engine(
    library: Library, path: Path, threads: int, cache: Path, n_prompt: int, n_gen: int
) -> Iterator[int]:
    settings = library.litert_lm_engine_settings_create(str(path), "cpu", None, None)
    if not settings:
        raise DeviceError(f"LiteRT-LM refuses {path}")
    library.litert_lm_engine_settings_set_cache_dir(settings, str(cache))
    library.litert_lm_engine_settings_set_num_threads(settings, threads)
    # Prompts are of so many tokens then, whatever their text is, and no token ends an answer.
    library.litert_lm_engine_settings_enable_benchmark(settings)
    library.litert_lm_engine_settings_set_num_prefill_tokens(settings, n_prompt)
    library.litert_lm_engine_settings_set_num_decode_tokens(settings, n_gen)
    engine = library.litert_lm_engine_create(settings)
    library.litert_lm_engine_settings_delete(settings)
    if not engine:
        raise DeviceError(f"LiteRT-LM refuses {path}")
    try:
        yield engine
    finally:
        library.litert_lm_engine_delete(engine)


def _session(library: Library, engine: int, n_prompt: int, n_gen: int) -> tuple[int, int]:
    """One prefill and one decode in a new session: their nanoseconds by the engine's own clock."""
    config = library.litert_lm_session_config_create()
    library.litert_lm_session_config_set_apply_prompt_template(config, False)
    sampler = library.litert_lm_sampler_params_create(TOP_P)
    library.litert_lm_sampler_params_set_top_k(sampler, 1)
    library.litert_lm_session_config_set_sampler_params(config, sampler)
    session = library.litert_lm_engine_create_session(engine, config)
    library.litert_lm_sampler_params_delete(sampler)
    library.litert_lm_session_config_delete(config)
    if not session:
        raise DeviceError("LiteRT-LM gives no session")
    try:
        text = library.litert_lm_input_data_create(0, PROMPT, len(PROMPT))  # 0: as text
        answer = library.litert_lm_session_generate_content(session, (ctypes.c_void_p * 1)(text), 1)
        library.litert_lm_input_data_delete(text)
        if not answer:
            raise DeviceError(f"LiteRT-LM generates nothing with {n_prompt} + {n_gen} tokens")
        library.litert_lm_responses_delete(answer)
        info = library.litert_lm_session_get_benchmark_info(session)
        try:
            return _turn(library, info, "prefill", n_prompt), _turn(library, info, "decode", n_gen)
        finally:
            library.litert_lm_benchmark_info_delete(info)
    finally:
        library.litert_lm_session_delete(session)


def _turn(library: Library, info: int, what: str, n_tokens: int) -> int:
    """Nanoseconds of the only prefill or decode of a session; DeviceError if it was not of `n_tokens`."""

    def tell(name: str, *index: int) -> Any:
        return getattr(library, f"litert_lm_benchmark_info_get_{name}")(info, *index)

    counts = [tell(f"{what}_token_count_at", turn) for turn in range(tell(f"num_{what}_turns"))]
    if counts != [n_tokens]:
        raise DeviceError(f"LiteRT-LM counted {counts} tokens of {what} instead of {n_tokens}")
    return round(1e9 * n_tokens / tell(f"{what}_tokens_per_sec_at", 0))
