"""The sampling defaults and end tokens that a generation_config.json states."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gemma_edge.runtime.artifacts.manifest import is_token_id
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.files.text_files import read_json
from gemma_edge.runtime.sampling import Sampling

GENERATION_CONFIG = "generation_config.json"
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_generation_config(path: Path, end_ids: Collection[int] = ()) -> tuple[Sampling, tuple[int, ...]]:
    """Sampling defaults and end ids of a generation_config.json.

    Args:
        end_ids: those of a file without eos_token_id.

    Raises:
        BundleError: the file is not JSON, or a value is out of range.
    """
    data = read_json(path, BundleError)
    values = {name: data[name] for name in SAMPLING_FIELDS if data.get(name) is not None}
    if data.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        sampling = Sampling(**values)
    except UsageError as error:
        raise BundleError(path, "sampling", "values in range", error) from None
    eos = data.get("eos_token_id")
    ids = tuple(end_ids) if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(map(is_token_id, ids)):
        raise BundleError(path, "eos_token_id", "a token id or a list of them", repr(eos))
    return sampling, ids
