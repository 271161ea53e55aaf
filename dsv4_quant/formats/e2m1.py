"""FP4 (E2M1): 1 sign, 2 exponent and 1 mantissa bit; two codes per byte, low nibble first.

OCP Microscaling Formats v1.0, section 5.3.3. Neither infinities nor NaN exist.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX = 6.0
"""The largest magnitude."""

VALUES: NDArray[np.float32] = np.array(
    [
        [+0.0, +0.5, +1.0, +1.5, +2.0, +3.0, +4.0, +6.0],
        [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    ],
    dtype=np.float32,
).reshape(16)
"""Code -> value; the second row of eight has the sign bit set."""


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes ``[..., k/2]`` -> codes ``[..., k]``: the even column is the low nibble."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 0x0F
    codes[..., 1::2] = packed >> 4
    return codes


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes ``[..., k]`` with even k -> bytes ``[..., k/2]``; the inverse of :func:`unpack`."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest code of every value; ties to the even code, saturating at 6. NaN is an error.

    A negative value that rounds to zero becomes code 8 (-0), as IEEE rounding has it.
    """
    if np.isnan(values).any():
        raise ValueError("FP4 has no code for NaN")
    magnitude = np.abs(values)
    midpoints = (VALUES[1:8] + VALUES[:7]) / 2
    below = np.searchsorted(midpoints, magnitude, side="left")  # a midpoint goes down ...
    above = np.searchsorted(midpoints, magnitude, side="right")  # ... or up: take the even code
    code = np.where(below % 2 == 0, below, above)
    return np.asarray(code | (np.signbit(values) << 3), np.uint8)
