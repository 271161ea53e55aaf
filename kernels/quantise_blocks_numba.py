"""What quantise_fp4 and quantise_fp8 share: blocks of weights to codes under a scale rule.

The CPU twin of quantise_blocks_torch, bit for bit: codes, scales and figures.

A *chunk* is some blocks of one row of blocks: 64 FP4 groups of 32, or one block of any other kind.
Each block, row-major and filled up with zeros to a power of two of values, is cut into 8 equal
*lanes* of p values. A chunk holds ``[8, G * p]``: the first lanes of its G blocks, side by side,
then all the second ones, and so on. So lane k and lane k + 4 are halves of every block at once,
which is what the sums fold; and all loops are long and straight, which is what LLVM vectorises.

The arithmetic is that of quantise_blocks_triton: float32 and integers, exact for every scale byte.
Squares and their sums are float64.

Dimensions: R rows, C columns, blocks of b x c, h x w of them; m = G * p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.rules import (
    FP8_LOSING,
    MARGIN,
    ZERO_EXPONENTS,
    Element,
    ScaleRule,
    candidates,
)
from dsv4_quant.kernels.figures import Figures, no_figures
from dsv4_quant.kernels.jit_numba import I64, NAN, expect, inline, kernel, part

U32, F32, F64 = np.uint32, np.float32, np.float64
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16] | NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

_LANES = 8
_GROUP = 32
"""Values of the groups that are worked on _TOGETHER, 4 values to a lane."""
_TOGETHER = 64

_ONE, _ZERO = U32(1), U32(0)
_MAGNITUDE = U32(0x7FFFFFFF)
_EXPONENT = U32(0x7F800000)
_INFINITY = 0x7F800000
_HALF_MANTISSA = U32(0x400000)


class Grid(NamedTuple):
    """The code values of an element, as the kernel needs them."""

    drop: np.uint32
    """Bits of a float32 mantissa that a code does not have."""
    smallest: np.uint32
    """Bits of the smallest normal value: no grid step is smaller than that of its binade."""
    top: np.float32
    top_bits: int
    top_code: np.uint32
    sign: np.uint32
    """What turns a code's sign on."""
    zero_sign: bool
    """Whether zero has one."""
    zero_scale: int
    """Scale byte of a block of zeros."""
    losing: np.float32
    """A block with such a value, in units of 2**s_max, keeps s_max."""


def _grid(element: Element, mantissa: int, smallest: float, top: float, losing: float) -> Grid:
    (top_code,) = np.flatnonzero((e2m1 if element == "fp4" else e4m3).VALUES == top)
    return Grid(
        drop=U32(23 - mantissa),
        smallest=F32(smallest).view(U32),
        top=F32(top),
        top_bits=int(F32(top).view(U32)),
        top_code=U32(top_code),
        sign=U32(8 if element == "fp4" else 0x80),
        zero_sign=element == "fp8",
        zero_scale=ZERO_EXPONENTS[element] + e8m0.BIAS,
        losing=F32(losing),
    )


GRIDS = {
    "fp4": _grid("fp4", 1, 1.0, e2m1.MAX, np.inf),
    "fp8": _grid("fp8", 3, 2.0**-6, e4m3.MAX, FP8_LOSING),
}
