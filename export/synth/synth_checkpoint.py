"""Writes synthetic checkpoints: published layout, shapes and side files, random weights.

No licence and no download is needed to export, measure and test at true size. Weights are drawn so that a
forward pass stays in range, and differ in every tensor. Writing is streamed: memory is a few blocks,
whatever the size.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.new_checkpoint import (
    NewShard,
    check_new,
    lay_out_shards,
    new_checkpoint,
    write_index,
)
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.synth.synth_gemma3n import SIZES, synthetic_contents
from gemma_edge.runtime.errors import UsageError

BLOCK = 1 << 21  # elements drawn at a time; one seed each
Json = dict[str, Any]


@dataclass(frozen=True)
class Synthetic:
    """What `synthesize` made: the folder, weights written (unused k/v weights included), bytes of weights."""

    path: Path
    parameters: int
    bytes: int


@dataclass(frozen=True)
class RandomTensor:
    """A tensor of a synthetic checkpoint: canonical name, shape as stored, and moments of its values."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def synthesize(
    path: str | Path,
    size: str = "tiny",
    *,
    seed: int = 0,
    config: Json | None = None,
    multimodal_layout: bool = True,
    encoders: bool = False,
    progress: bool = True,
) -> Synthetic:
    """Writes a checkpoint folder of bf16 weights, tokenizer, chat template and configs.

    Args:
        path: the folder to make; it may exist if it is empty.
        size: "tiny" (about 2 M parameters, every mechanism present), "e2b" or "e4b" (as published).
        seed: the same seed gives the same bytes.
        config: fields of the text config that replace those of `size`; None removes one.
        multimodal_layout: config and names of Gemma3nForConditionalGeneration, else of Gemma3nForCausalLM.
        encoders: also the weights of the encoders that the config describes (multimodal layout only).
        progress: show a bar on stderr when that is a terminal.

    Raises:
        UsageError: unknown size, or `path` is not an empty folder.
        ConfigError: `config` does not make a valid model.
        GemmaEdgeError: the disk is full or refuses. Nothing is left behind, nor after an interrupt.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size {size!r}: choose {', '.join(SIZES)}")
    path = check_new(Path(path))
    contents = synthetic_contents(path, size, config or {}, multimodal_layout, encoders)
    tensors = [RandomTensor(*tensor) for tensor in contents.tensors]
    parameters = sum(tensor.size for tensor in tensors)
    with new_checkpoint(path, 2 * parameters) as folder:
        for name, content in contents.files.items():
            (folder / name).write_bytes(content)
        with ProgressBar("weights", 2 * parameters, progress, "B") as bar:
            _write_weights(folder, tensors, contents.stored_name, seed, bar.advance)
    return Synthetic(path, parameters, 2 * parameters)


# Weights. -----------------------------------------------------------------------------------------


@cache
def _quantiles() -> NDArray[np.float32]:
    """The normal distribution as 65,536 equally likely values."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


@cache
def _bf16_quantiles(mean: float, std: float) -> NDArray[np.uint16]:
    """`_quantiles` scaled, as bf16 bits: drawing a weight is then one look-up with 16 random bits."""
    bits = (_quantiles() * np.float32(std) + np.float32(mean)).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_weights(
    folder: Path,
    tensors: list[RandomTensor],
    stored: Callable[[str], str],
    seed: int,
    advance: Callable[[int], object],
) -> None:
    """Writes all shards, and their index when there is more than one."""
    by_key = {stored(tensor.name): tensor for tensor in tensors}
    shards, total = lay_out_shards((key, "BF16", tensor.shape) for key, tensor in by_key.items())
    for shard in shards:
        _write_shard(folder / shard.name, shard, by_key, seed, advance)
    write_index(folder, shards, total)


def _write_shard(
    path: Path,
    shard: NewShard,
    tensors: Mapping[str, RandomTensor],
    seed: int,
    advance: Callable[[int], object],
) -> None:
    """Header first, then blocks of every tensor, each at its offset, by a few threads."""
    jobs = [  # tensor, block number, offset
        (tensors[key], i, offset + 2 * i * BLOCK)
        for key, offset in shard.offsets.items()
        for i in range(-(-tensors[key].size // BLOCK))
    ]
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        _write_all(fd, shard.header, 0)

        def write(job: tuple[RandomTensor, int, int]) -> int:
            tensor, block, at = job
            data = random_block(tensor, block, seed)
            _write_all(fd, data.data.cast("B"), at)
            return data.nbytes

        for count in pool.map(write, jobs):
            advance(count)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(fd)


def random_block(tensor: RandomTensor, block: int, seed: int) -> NDArray[np.uint16]:
    """bf16 bits of one block: the seed, the tensor's name and the block's number decide them."""
    count = min(BLOCK, tensor.size - block * BLOCK)
    generator = np.random.SFC64([seed, zlib.crc32(tensor.name.encode()), block])
    random = generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
    return np.take(_bf16_quantiles(tensor.mean, tensor.std), random, mode="wrap")


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
