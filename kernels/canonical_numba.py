"""The canonical form of decoded values, which the value digest hashes: -0 counts as +0.

BF16 values stay BF16; float32 values are checked for whether BF16 holds them. What FP4 decodes to
is canonical already (``fp4_to_bf16``), and FP8 decodes to it on request (``fp8_to_bf16``), so
those need no pass of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import INEXACT, NAN, U64, expect, kernel

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]
Words = NDArray[np.uint64]

# Per format, in every lane of a 64-bit word: the magnitude bits, what lifts a NaN's magnitude and
# nothing smaller into the sign bit, and the bits that BF16 does not have.
_BF16 = U64(0x7FFF7FFF7FFF7FFF), U64(0x007F007F007F007F), U64(0)
_F32 = U64(0x7FFFFFFF7FFFFFFF), U64(0x007FFFFF007FFFFF), U64(0x0000FFFF0000FFFF)


def canonical_bf16(bits: Bits, out: Bits) -> int:
    """-0 to +0 in BF16. ``out`` has the shape of ``bits``, and may be ``bits`` itself.

    Returns:
        NAN if there is one, or 0. A NaN is copied as it is.
    """
    expect("bits", bits, np.uint16, bits.shape)
    expect("out", out, np.uint16, bits.shape)
    return _in_words(bits, out, *_BF16)


def canonical_f32(values: Floats, out: Floats) -> int:
    """-0 to +0 in float32. ``out`` has the shape of ``values``, and may be ``values`` itself.

    Returns:
        INEXACT if some value has more than the 8 significant bits of BF16, NAN if there is one;
        both, or 0. A NaN is copied as it is.
    """
    expect("values", values, np.float32, values.shape)
    expect("out", out, np.float32, values.shape)
    return _in_words(values, out, *_F32)


def f32_to_bf16(values: Floats, out: Bits) -> int:
    """float32 to BF16 by dropping the lower half, which is a conversion only where that is 0.

    Returns:
        INEXACT if it is not 0 somewhere, and then the output is of no use; or 0.
    """
    expect("values", values, np.float32, values.shape)
    expect("out", out, np.uint16, values.shape)
    return _upper_halves(values.reshape(-1).view(np.uint32), out.reshape(-1))


def _in_words(source: NDArray[Any], out: NDArray[Any], *lanes: np.uint64) -> int:
    source, out = source.reshape(-1), out.reshape(-1)
    rest = source.size % (8 // source.itemsize)
    whole = source.size - rest
    flags = _canonical(source[:whole].view(np.uint64), out[:whole].view(np.uint64), *lanes)
    if rest:
        word = np.zeros(1, np.uint64)
        last = word.view(source.dtype)[:rest]
        last[:] = source[whole:]
        flags |= _canonical(word, word, *lanes)
        out[whole:] = last
    return flags


@kernel
def _canonical(
    source: Words, out: Words, magnitudes: np.uint64, nan_lift: np.uint64, beyond_bf16: np.uint64
) -> int:
    """Adding ``magnitudes`` to a magnitude sets the sign bit unless it is 0. The other bits of that
    sum do not matter: ``x`` masks them with its own."""
    nans, used = U64(0), U64(0)
    for i in range(source.size):
        x = source[i]
        magnitude = x & magnitudes
        nans |= magnitude + nan_lift
        used |= x
        out[i] = x & (magnitude | (magnitude + magnitudes))
    return (NAN if nans & ~magnitudes else 0) | (INEXACT if used & beyond_bf16 else 0)


@kernel
def _upper_halves(values: NDArray[np.uint32], out: Bits) -> int:
    used = np.uint32(0)
    for i in range(values.size):
        x = values[i]
        used |= x
        out[i] = x >> 16
    return INEXACT if used & 0xFFFF else 0
