"""How many bits activations have in integer products of an ONNX encoder.

An activation is u8 around a middle, a weight i8. x86 CPUs without VNNI add two products in 16 bits, which
255 * 127 twice overflows: the sum saturates and the result is wrong. Seven bits cannot overflow. A graph has
8 bits; on such a CPU the runtime replaces its two constants.
"""

from __future__ import annotations

import numpy as np

STEP, MIDDLE = "activation_step", "activation_middle"
# By the constants' names: the largest value of a row times the step is the row's scale; the middle is 0.
INTEGER_ACTIVATIONS = {STEP: np.float32(1 / 127), MIDDLE: np.uint8(128)}
NARROW_ACTIVATIONS = {STEP: np.float32(1 / 63), MIDDLE: np.uint8(64)}
