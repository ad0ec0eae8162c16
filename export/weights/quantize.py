"""Symmetric quantization in blocks, to the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into blocks of `group`; the last one is padded. A block holds unsigned 4- or
8-bit values around a zero point of half their range, and one scale: weight = (value - zero point) * scale.
Channel-wise means one block a row, as wide as the row.

Clip "none" scales the largest magnitude of a block to 7 (127), so that nothing is clipped. Clip "mse" looks
for less squared error: it also tries the full range, whose extra step -8 (-128) has one sign only, so the
scale takes the sign that puts the largest weight there; and it tries scales that clip that weight a little.
Each candidate's integers are judged with the scale that suits them best in the least-squares sense, which
for weights w and integers q is sum(w q) / sum(q q) with error sum(w w) - sum(w q)^2 / sum(q q).
On normal weights at 4 bits the RMS error is within 1 % of an exhaustive search over the scale, and 16 % below
clip "none". Engines whose scales must be positive (XNNPACK refuses others, zero included) lose the choice of
sign: 5 % more RMS error at 4 bits in groups of 32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.row_table import Bytes, Floats, dequantize_blocks, unpack_nibbles

__all__ = [
    "BlockQuantized",
    "ScaleForm",
    "dequantize",
    "pack_nibbles",
    "quantize",
    "quantize_stream",
    "unpack_nibbles",
]

Clip = Literal["none", "mse"]
ScaleType = Literal["float32", "float16", "bfloat16"]

# Where the largest weight of a block goes, as a fraction of -8 (-128); above 1 it is clipped. The first
# is clip "none". At 8 bits a step is so small that clipping never pays.
CANDIDATES = {4: (7 / 8, 0.95, 1.0, 1.08, 1.16, 1.24), 8: (127 / 128, 1.0)}
# The wider a block, the further out its largest weight, and the more of it 4 bits had better clip.
WIDE_CANDIDATES = (*CANDIDATES[4], 1.34, 1.46, 1.6, 1.75)
WIDE = 512

# Blocks without a weight above this become zero: their scale would be too close to the denormals.
TINIEST = np.float32(2.0**-100)
# Above this, a scale times its largest integer could overflow.
LARGEST = np.float32(2.0**126)

# What scales a block of zeros where 0 is refused: normal in every float type that a scale is stored in.
SMALLEST_POSITIVE = np.float32(2.0**-14)

# Weights that one pass handles. Smaller tiles suit a core's cache, but each of their operations is so short
# that two threads spend their time handing over the interpreter's lock.
TILE = 1 << 18


@dataclass(frozen=True)
class ScaleForm:
    """What an engine takes as a scale: its precision, and whether it must be above 0, as of `quantize`."""

    type: ScaleType = "float32"
    positive: bool = False


FP32_SCALES = ScaleForm()


@dataclass(frozen=True)
class BlockQuantized:
    """Quantized rows.

    data: uint8 (N, blocks, group * bits / 8), low nibble first for 4 bits.
    scales: float32 (N, blocks); may be negative with clip "mse", unless positive ones were asked for.
    columns: K, the weights of a row before padding.
    """

    data: Bytes
    scales: Floats
    bits: int
    group: int
    columns: int


def pack_nibbles(values: Bytes, axis: int = -1) -> Bytes:
    """Pairs of 4-bit values (0..15) along `axis` to bytes, the first of a pair in the low nibble.

    Raises:
        ValueError: an odd number of values along `axis`.
    """
    if values.shape[axis] % 2:
        raise ValueError(f"an even number of nibbles is needed, not {values.shape[axis]}")
    along = np.moveaxis(values, axis, 0)
    packed = np.left_shift(along[1::2], 4)
    np.bitwise_or(packed, along[0::2], out=packed)
    return np.moveaxis(packed, 0, axis)


def dequantize(quantized: BlockQuantized) -> Floats:
    """The weights that `quantized` stands for, float32 (N, K)."""
    return dequantize_blocks(quantized.data, quantized.scales, quantized.bits)[:, : quantized.columns]


def quantize(
    weights: NDArray[Any],
    bits: int,
    group: int,
    clip: Clip = "mse",
    scale_type: ScaleType = "float32",
    positive: bool = False,
) -> BlockQuantized:
    """Quantizes rows (N, K) of float32 (float16 and bfloat16 too) on one core.

    Args:
        weights: finite, of magnitude at most 2**126.
        bits: 4 or 8.
        group: weights in a block, a power of two, at least 16; 0 for a whole row.
        clip: "none" (largest magnitude kept exactly representable) or "mse" (least squared error).
        scale_type: the precision that the scales will be stored in. They are rounded to it before the
            integers are chosen, so that these make up for it. "bfloat16" means float16 that rounding to
            bfloat16 does not change.
        positive: every scale is above 0, also that of a block of zeros.

    Raises:
        ValueError: a NaN or infinity, a scale above what `scale_type` holds, or a bad argument.
    """
    if bits not in CANDIDATES:
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    rows, columns = weights.shape
    if group == 0:
        group = columns + columns % 2
    elif group < 16 or group & (group - 1):
        raise ValueError(f"group must be a power of two of 16 or more, or 0, not {group}")
    blocks = -(-columns // group)
    data = np.empty((rows, blocks, group * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    step = max(1, TILE // (blocks * group))
    kernel = _Kernel(bits, group, clip, scale_type, positive, blocks * min(step, rows))
    staged = weights.dtype != np.float32 or columns != blocks * group or not weights.flags.c_contiguous
    stage = np.zeros((min(step, rows), blocks * group), np.float32) if staged else None
    for row in range(0, rows, step):
        part = weights[row : row + step]
        if stage is not None:
            stage[: len(part), :columns] = part
            part = stage[: len(part)]
        kernel.run(
            part.reshape(-1, group),
            data[row : row + step].reshape(len(part) * blocks, -1),
            scales[row : row + step].reshape(-1),
        )
    return BlockQuantized(data, scales, bits, group, columns)


def quantize_stream(
    chunks: Iterable[NDArray[Any]],
    bits: int,
    group: int,
    clip: Clip = "mse",
    workers: int = 2,
    scale_type: ScaleType = "float32",
    positive: bool = False,
) -> Iterator[BlockQuantized]:
    """`quantize` of each chunk of rows, in order, on `workers` threads.

    At most workers + 1 chunks are in flight, taken from `chunks` and not yet yielded: that bounds the
    memory for a tensor of any size. A chunk must not be written to after it was handed over.
    """
    work = partial(quantize, bits=bits, group=group, clip=clip, scale_type=scale_type, positive=positive)
    pending: deque[Future[BlockQuantized]] = deque()
    pool = ThreadPoolExecutor(workers, "quantize")
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # On an error or Ctrl-C the chunks that have not begun are dropped.
        pool.shutdown(cancel_futures=True)


class _Kernel:
    """Quantizes tiles of blocks with preallocated scratch.

    Blocks are transposed to (group, blocks): every reduction and broadcast over a block then runs along
    long contiguous rows, which is what NumPy is fast at. A block is first normalized so that its largest
    weight is -8 (-128); candidates are then plain factors, and magnitudes cannot overflow.
    """

    def __init__(
        self, bits: int, group: int, clip: Clip, scale_type: ScaleType, positive: bool, blocks: int
    ) -> None:
        self.bits, self.clip, self.scale_type, self.positive = bits, clip, scale_type, positive
        self.candidates = WIDE_CANDIDATES if bits == 4 and group >= WIDE else CANDIDATES[bits]
        self.low, self.high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        self.scratch = [np.empty((group, blocks), np.float32) for _ in range(3)]
        self.unsigned = np.empty((group, blocks), np.uint8)

    def run(self, blocks: Floats, data: Bytes, scales: Floats) -> None:
        """blocks (B, group) to data (B, group * bits / 8) and scales (B,)."""
        x, q, product = (array[:, : len(blocks)] for array in self.scratch)
        np.copyto(x, blocks.T)
        top: Floats = np.maximum.reduce(x, axis=0)
        bottom: Floats = np.minimum.reduce(x, axis=0)
        extreme = np.where(top > -bottom, top, bottom)
        if self.clip == "none" or self.positive:
            extreme = -np.abs(extreme)
        magnitude = np.abs(extreme)
        # A NaN compares false, so this refuses it too.
        if magnitude.size and not np.max(magnitude) <= LARGEST:
            raise ValueError("a weight is NaN, infinite or above 2**126")
        zero = magnitude < TINIEST
        extreme[zero] = self.low
        inverse = np.float32(self.low) / extreme
        inverse[zero] = 0
        np.multiply(x, inverse, out=x)
        unclipped = np.float32(self.candidates[0])
        factor = unclipped if self.clip == "none" else self.best_factor(x, q, product)
        extreme /= np.float32(self.low)
        scale = self.rounded(np.divide(extreme, factor, dtype=np.float32))
        # x * extreme is the weight, so this is weight / scale.
        np.multiply(x, extreme / scale, out=q)
        self.round_to_range(q, clipped=True)
        q += -self.low
        unsigned = self.unsigned[:, : len(blocks)]
        np.copyto(unsigned, q, casting="unsafe")
        data[...] = (pack_nibbles(unsigned, axis=0) if self.bits == 4 else unsigned).T
        scale[zero] = SMALLEST_POSITIVE if self.positive else 0
        scales[...] = scale

    def best_factor(self, x: Floats, q: Floats, product: Floats) -> Floats:
        """For each normalized block, the factor whose integers leave the least squared error."""
        best_fit = np.full(x.shape[1], -1, np.float32)
        best = np.ones(x.shape[1], np.float32)
        for candidate in self.candidates:
            np.multiply(x, np.float32(candidate), out=q)
            self.round_to_range(q, clipped=candidate > self.high / -self.low)
            np.multiply(q, q, out=product)
            norm = np.add.reduce(product, axis=0)
            np.multiply(x, q, out=product)
            dot = np.add.reduce(product, axis=0)
            np.maximum(norm, 1, out=norm)  # 0 in a zero block only
            fit = dot * dot / norm
            better = (fit > best_fit) & (dot > 0)
            np.copyto(best_fit, fit, where=better)
            np.divide(norm, dot, out=best, where=better)
        return best

    def round_to_range(self, q: Floats, clipped: bool) -> None:
        np.rint(q, out=q)
        if clipped:
            np.clip(q, self.low, self.high, out=q)

    def rounded(self, scale: Floats) -> Floats:
        """The scale as `scale_type` holds it, still in float32."""
        if self.scale_type == "float32":
            return scale
        if self.scale_type == "bfloat16":
            # To the nearest; a positive scale cannot become 0, as float16 is checked for below.
            scale = ((scale.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if np.isinf(half).any():
            raise ValueError("a weight is too large for a scale in float16")
        # Among the denormals rounding is coarse: towards zero it would clip weights, or lose the block.
        small = (np.abs(scale) < np.finfo(np.float16).smallest_normal) & (np.abs(half) < np.abs(scale))
        half[small] = np.nextafter(
            half[small], np.copysign(np.float16(np.inf), scale[small]).astype(np.float16)
        )
        return half.astype(np.float32)
