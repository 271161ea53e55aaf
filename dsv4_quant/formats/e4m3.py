"""FP8 (E4M3FN): 1 sign, 4 exponent and 3 mantissa bits, bias 7, subnormals, NaN but no infinity.

OCP 8-bit Floating Point Specification v1.0, section 5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX = 448.0
"""The largest magnitude."""

NAN_CODES = (0x7F, 0xFF)
"""The only two codes that are not numbers."""


def _values() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    subnormal = np.ldexp(mantissa / 8, -6)
    magnitude = np.where(exponent == 0, subnormal, normal)
    magnitude[list(NAN_CODES)] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


VALUES: NDArray[np.float32] = _values()
"""Code -> value."""


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest code of every value; ties to the even code, saturating at 448; NaN to 0x7F.

    A negative value that rounds to zero becomes 0x80 (-0), as IEEE rounding has it.
    """
    magnitude = np.abs(values)
    midpoints = (VALUES[1:0x7F] + VALUES[:0x7E]) / 2  # exact: one bit more than the mantissa
    below = np.searchsorted(midpoints, magnitude, side="left")
    above = np.searchsorted(midpoints, magnitude, side="right")
    code = np.where(below % 2 == 0, below, above) | (np.signbit(values) << 7)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)
