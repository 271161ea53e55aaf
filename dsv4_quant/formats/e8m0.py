"""E8M0: a scale byte b means 2**(b - 127); 0xFF means NaN. There is no zero and no sign.

OCP Microscaling Formats v1.0, section 5.4.1. Byte 0 is 2**-127, a float32 subnormal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NAN = 0xFF
"""The only byte that is not a number."""

BIAS = 127


def _values() -> NDArray[np.float32]:
    values = np.ldexp(np.float64(1), np.arange(256) - BIAS)
    values[NAN] = np.nan
    return values.astype(np.float32)


VALUES: NDArray[np.float32] = _values()
"""Byte -> value."""


def is_power_of_two(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which values an E8M0 byte can hold exactly: 2**-127 ... 2**127."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    in_range = (exponent - 1 >= -BIAS) & (exponent - 1 <= BIAS)
    exact: NDArray[np.bool_] = np.isfinite(values) & (mantissa == 0.5) & in_range
    return exact


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The bytes of powers of two. Anything else is a ValueError: a scale is never rounded here."""
    if not is_power_of_two(values).all():
        raise ValueError("a scale that is no power of two has no E8M0 byte")
    return (np.frexp(values.astype(np.float64))[1] - 1 + BIAS).astype(np.uint8)
