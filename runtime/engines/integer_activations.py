"""How many bits activations have in integer products of an ONNX encoder.

An activation is u8 around a middle, a weight i8. x86 CPUs without VNNI add two products in 16 bits, which
255 * 127 twice overflows: the sum saturates and the result is wrong. Seven bits cannot overflow. A graph has
8 bits; on such a CPU the runtime replaces its two constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP, MIDDLE = "activation_step", "activation_middle"
# By the constants' names: the largest value of a row times the step is the row's scale; the middle is 0.
INTEGER_ACTIVATIONS: dict[str, NDArray[Any]] = {
    STEP: np.array(1 / 127, np.float32),
    MIDDLE: np.array(128, np.uint8),
}
NARROW_ACTIVATIONS: dict[str, NDArray[Any]] = {
    STEP: np.array(1 / 63, np.float32),
    MIDDLE: np.array(64, np.uint8),
}
