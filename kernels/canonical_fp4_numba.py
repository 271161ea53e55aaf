"""The canonical FP4 form of FP4 codes and scales: one code and one scale for every value there is.

FP4 writes most values in several ways: 3 under a scale of 2^s is 6 under 2^(s - 1), and 0 is -0. In
the canonical form every block of 32 columns has the smallest scale that reaches its largest value,
``s >= -127`` with ``amax <= 6 * 2^s``, which holds the whole block if any scale does (the proof
stands in ``bf16_to_fp4_numba``); a block of zeros has the scale 2^-126 and -0 is 0. So two weights
of the same values have the same bytes here, however they were quantised.

A scale is the smallest if some magnitude is 4 or 6: 3 and below fit the next smaller one as well.
Going there, every magnitude doubles: of the codes 0 to 5 each from 2 on grows by two, 1 by one.
Quantisers round to nearest, so of the blocks with ``3 * 2^s < amax``, a fifth hold no more than
3 * 2^s afterwards: a step of one is as ordinary as none, and the fast loop takes both. It leaves
what lies farther off, and blocks of zeros with another scale, to a loop of their own.

Dimensions: R rows, C columns, G = C / 32 scales per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e8m0
from dsv4_quant.kernels.jit_numba import I64, INEXACT, NAN, U64, expect, inline, kernel, part

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]

GROUP = 32
"""Columns per scale: two words of sixteen codes."""

ZERO_SCALE = 1
"""E8M0 byte of 2^-126, what the published quantiser gives a block of zeros."""

MAX_SCALE = 252
"""E8M0 byte of 2^125, the largest whose every value is below 2^128, where float32 ends."""

_MAGNITUDES = U64(0x7777777777777777)
_ONES = U64(0x1111111111111111)
_TWOS = U64(0x2222222222222222)
_FOURS = U64(0x4444444444444444)


def canonical_fp4(packed: Bytes, scales: Bytes, out: Bytes, out_scales: Bytes) -> int:
    """Rewrite a panel.

    Args:
        packed: ``[R, C / 2]``, low nibble first.
        scales: ``[R, G]`` E8M0.
        out: ``[R, C / 2]``, written.
        out_scales: ``[R, G]``, written.

    Returns:
        INEXACT if a value is 2^128 or more, which float32 does not have, NAN if a scale is 0xFF;
        both, or 0. What was written counts only with 0.
    """
    rows, groups = scales.shape
    expect("packed", packed, np.uint8, (rows, groups * GROUP // 2))
    expect("scales", scales, np.uint8, (rows, groups))
    expect("out", out, np.uint8, packed.shape)
    expect("out_scales", out_scales, np.uint8, scales.shape)
    return _canonical(packed.view(np.uint64), scales, out.view(np.uint64), out_scales)


@kernel
def _canonical(words: Words, scales: Bytes, out: Words, out_scales: Bytes) -> int:
    rows, groups = scales.shape
    flags = 0
    for row in range(rows):
        others = 0
        for g in range(groups):
            one, two, scale = words[row, 2 * g], words[row, 2 * g + 1], U64(scales[row, g])
            step = U64(1) if _is_loose(one, two) & (scale > U64(0)) else U64(0)
            out[row, 2 * g] = _rewritten(one, step)
            out[row, 2 * g + 1] = _rewritten(two, step)
            out_scales[row, g] = scale - step
            others += ((one | two) & _FOURS == U64(0)) | (scale > U64(MAX_SCALE))
        if others:
            flags |= _search(words[row], scales[row], out[row], out_scales[row])
    return flags


@inline
def _is_loose(one: np.uint64, two: np.uint64) -> bool:
    """Whether no magnitude of a block is 4 or 6 (codes 6 and 7)."""
    return bool(((one & (one >> U64(1))) | (two & (two >> U64(1)))) & _TWOS == U64(0))


@inline
def _rewritten(x: np.uint64, step: np.uint64) -> np.uint64:
    """Sixteen codes without -0; with ``step`` 1, which needs a loose block, magnitudes doubled."""
    m = x & _MAGNITUDES
    lifted = m + _MAGNITUDES  # bit 3 where m > 0
    is_one = m & ~(m >> U64(1)) & ~(m >> U64(2)) & _ONES
    growth = ((lifted >> U64(2)) & _TWOS) - is_one
    return (x & (m | lifted)) + (growth & (U64(0) - step))


@part
def _search(words: Words, scales: Bytes, out: Words, out_scales: Bytes) -> int:
    """The blocks of one row that are not ordinary, for any scale; returns flags."""
    flags = 0
    for g in range(scales.size):
        one, two, scale = words[2 * g], words[2 * g + 1], I64(scales[g])
        if (one | two) & _FOURS and scale <= MAX_SCALE:
            continue
        if scale == e8m0.NAN:
            flags |= NAN
        elif (one | two) & _MAGNITUDES == U64(0):
            one, two, scale = U64(0), U64(0), ZERO_SCALE
        else:
            one, two = _rewritten(one, U64(0)), _rewritten(two, U64(0))
            while scale > 0 and _is_loose(one, two):  # three times at most: 0.5 becomes 4
                one, two, scale = _rewritten(one, U64(1)), _rewritten(two, U64(1)), scale - 1
            flags |= INEXACT if scale > MAX_SCALE else 0
        out[2 * g], out[2 * g + 1], out_scales[g] = one, two, scale
    return flags
