"""BF16: the upper 16 bits of a float32, held as uint16 because numpy has no such type."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def decode(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 value of every BF16; always exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def is_exact(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which float32 values a BF16 can hold exactly."""
    exact: NDArray[np.bool_] = (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF) == 0
    return exact


def encode(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The BF16 bits of values that fit exactly; a ValueError otherwise."""
    if not is_exact(values).all():
        raise ValueError("a value needs more than the 8 significant bits of BF16")
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
