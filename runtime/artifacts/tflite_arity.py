"""How many inputs an operator of a .tflite reads: engines read that many, whatever the file lists."""

from __future__ import annotations

from collections.abc import Mapping

# BuiltinOperator codes of LiteRT's schema, by the inputs that their kernels read.
_EXACTLY = {
    # floor, dequantize, logistic, relu, relu6, softmax, tanh, exp, cast, neg, sin, log, sqrt, rsqrt, shape,
    # not, square, leaky_relu, abs, ceil, cos, elu, quantize, round, hard_swish, gelu
    1: (
        *(6, 8, 14, 19, 21, 25, 28, 47, 53, 59, 66, 73, 75, 76, 77),
        *(87, 92, 98, 101, 104, 108, 111, 114, 116, 117, 150),
    ),
    # add, embedding_lookup, mul, pad, gather, transpose, mean, sub, div, topk, split, prelu, maximum,
    # arg_max, minimum, less, greater, greater_equal, less_equal, tile, expand_dims, equal, not_equal, sum,
    # pow, arg_min, reduce_prod, reduce_max, or, and, reduce_min, floor_div, fill, floor_mod,
    # squared_difference, mirror_pad, gather_nd, batch_matmul, cumsum, broadcast_to
    2: (
        *(0, 7, 18, 34, 36, 39, 40, 41, 42, 48, 49, 54, 55, 56),
        *(57, 58, 61, 62, 63, 69, 70, 71, 72, 74, 78, 79),
        *(81, 82, 84, 86, 89, 90, 94, 95, 99, 100),
        *(107, 126, 128, 130),
    ),
    # padv2, select, slice, range, split_v, scatter_nd, select_v2, dynamic_update_slice
    3: (60, 64, 65, 96, 102, 122, 123, 151),
    # strided_slice, one_hot
    4: (45, 85),
}
# The last input may be left out: the bias of conv_2d, depthwise_conv_2d and fully_connected, reshape's shape.
_ONE_LESS = {3: 3, 4: 3, 9: 3, 22: 2}
ARITY: Mapping[int, tuple[int, int]] = {
    **{code: (count, count) for count, codes in _EXACTLY.items() for code in codes},
    **{code: (count - 1, count) for code, count in _ONE_LESS.items()},
}


def wrong_arity(code: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> str | None:
    """What an operator of this code should have, where it has something else; -1 is an input left out."""
    least, most = ARITY.get(code, (0, len(inputs)))
    if not least <= len(inputs) <= most or min(inputs[:least], default=0) < 0:
        return f"{least} inputs" if least == most else f"{least} or {most} inputs"
    return None if outputs else "an output"
