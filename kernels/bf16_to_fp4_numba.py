"""BF16 to FP4 where no value changes: one power-of-two scale per 1 x group block, or a refusal.

A block takes the smallest scale 2^s, s >= -127, with ``amax <= 6 * 2^s``. If any scale holds the
block exactly, this one does:

    Let 2^t hold the block: every value is c * 2^t with |c| in {0, 0.5, 1, 1.5, 2, 3, 4, 6}. Then
    amax <= 6 * 2^t, so s <= t, because t too is at least -127. If s = t there is nothing to show.
    If s < t, then amax <= 6 * 2^(t-1), so every |c| is at most 3; and 2c, for c in {0, 0.5, 1,
    1.5, 2, 3}, is {0, 1, 2, 3, 4, 6}, which are codes again. So 2^(t-1) holds the block as well.
    Repeat down to s.

    The lower clamp changes nothing: s = -127 is chosen only when amax <= 6 * 2^-127, and there is
    no smaller E8M0 scale that could have served instead. The upper end is never met: the largest
    BF16 is below 2^128 = 4 * 2^126.

A block of zeros is exact with any scale and takes the published quantiser's floor, 2^-126. Values
count, not bits: -0 becomes code 0.

Dimensions: R rows, C columns, G = C / group scales per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e8m0
from dsv4_quant.kernels.jit_numba import I64, INEXACT, NAN, U64, expect, inline, kernel, part

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]
Ints = NDArray[np.int64]

ZERO_BLOCK_SCALE = 1
"""E8M0 byte of 2^-126: the published quantiser takes no block for smaller than 6 * 2^-126."""

_BLOCK = 32
"""Columns that are worked on together: 8 words of 4 BF16 values."""

_SCALE_MIN = 2  # 0.5 * scale is a normal BF16
_INFINITY = 0x7F80

_LANES = U64(0x0001000100010001)
_MAGNITUDES = U64(0x7FFF7FFF7FFF7FFF)
_SIGNS = U64(0x8000800080008000)
_ONLY_ZEROS = U64(_INFINITY) * _LANES  # as base: nothing finite reaches it


def fp4_scales_exact(bits: Bits, group: int, out_scales: Bytes, result: Ints) -> int:
    """The only scales worth trying: the first pass, because scales precede weights in a file.

    Args:
        bits: ``[R, C]`` BF16.
        group: columns per scale, a multiple of 32.
        out_scales: ``[R, G]`` E8M0, written.
        result: ``[3]``: row, column and BF16 bits of the first value at fault, if there is one.

    Returns:
        0, or NAN for an infinity or a NaN; then the work stopped there.
    """
    _check_panel(bits, group, out_scales, result)
    return _fp4_scales(bits, group, out_scales, result)


def fp4_codes_exact(bits: Bits, group: int, scales: Bytes, out: Bytes, result: Ints) -> int:
    """The codes under given scales: the second pass.

    Args:
        bits: ``[R, C]`` BF16.
        group: columns per scale, a multiple of 32.
        scales: ``[R, G]`` E8M0, none of them 0xFF.
        out: ``[R, C / 2]``, low nibble first, written.
        result: ``[3]``: row, column and BF16 bits of the first value at fault, if there is one.

    Returns:
        0, or INEXACT for a value that is no code times its scale; then the work stopped there.
    """
    _check_panel(bits, group, scales, result)
    rows, cols = bits.shape
    expect("out", out, np.uint8, (rows, cols // 2))
    if group != _BLOCK:  # a wider group is several blocks of the same scale
        scales = scales.repeat(group // _BLOCK, axis=1)
    return _fp4_codes(
        bits,
        bits.view(np.uint64),
        scales,
        e2m1.VALUES,
        e8m0.VALUES,
        out,
        out.view(np.uint16),
        result,
    )


def bf16_to_fp4_exact(bits: Bits, group: int, out_scales: Bytes, out: Bytes, result: Ints) -> int:
    """Both passes over one panel; arguments and status as there."""
    status = fp4_scales_exact(bits, group, out_scales, result)
    return status or fp4_codes_exact(bits, group, out_scales, out, result)


def _check_panel(bits: Bits, group: int, scales: Bytes, result: Ints) -> None:
    rows, cols = bits.shape
    if group % _BLOCK or cols % group:
        raise ValueError(f"{cols} columns cannot be coded in groups of {group}")
    expect("bits", bits, np.uint16, (rows, cols))
    expect("scales", scales, np.uint8, (rows, cols // group))
    expect("result", result, np.int64, (3,))


@kernel
def _fp4_scales(bits: Bits, group: int, out_scales: Bytes, result: Ints) -> int:
    """With amax = 1.f * 2^e: s = e - 2 as long as 1.f <= 1.5, else e - 1. Adding 63 to the BF16
    carries into the exponent field exactly if the 7-bit fraction is above 64, that is 1.f > 1.5."""
    rows, cols = bits.shape
    maxima = np.empty(cols // 2, np.uint16)
    for row in range(rows):
        _block_maxima(bits[row], maxima)
        for g in range(out_scales.shape[1]):
            amax = 0
            for b in range(g * group // _BLOCK, (g + 1) * group // _BLOCK):
                amax = max(amax, I64(maxima[b]))
            if amax >= _INFINITY:
                col = g * group
                while bits[row, col] & 0x7FFF < _INFINITY:
                    col += 1
                result[0], result[1], result[2] = row, col, bits[row, col]
                return NAN
            out_scales[row, g] = max(((amax + 63) >> 7) - 2, 0) if amax else ZERO_BLOCK_SCALE
    return 0


@part
def _block_maxima(bits: Bits, maxima: Bits) -> None:
    """The largest magnitude of every 32 columns, by folding neighbours until 32 are one."""
    for k in range(maxima.size):
        a, b = bits[2 * k] & 0x7FFF, bits[2 * k + 1] & 0x7FFF
        maxima[k] = a if a > b else b
    size = maxima.size
    while size > bits.size // _BLOCK:
        size //= 2
        for k in range(size):
            a, b = maxima[2 * k], maxima[2 * k + 1]
            maxima[k] = a if a > b else b


@kernel
def _fp4_codes(
    bits: Bits,
    bits4: NDArray[np.uint64],
    scales: Bytes,
    code_values: NDArray[np.float32],
    scale_values: NDArray[np.float32],
    out: Bytes,
    out4: NDArray[np.uint16],
    result: Ints,
) -> int:
    """``bits4`` and ``out4`` hold 4 values per element.

    The base is the BF16 of half the scale, which has code 1: exponent field scale - 1, mantissa 0.
    Where that is not a normal BF16, the fast loop serves zeros only and leaves the rest of the row.
    """
    rows, blocks = scales.shape
    bases = np.empty((blocks, 8), np.uint64)
    flat_bases = bases.reshape(-1)
    for row in range(rows):
        others = 0
        for b in range(blocks):
            scale = U64(scales[row, b])
            others += scale == e8m0.NAN
            base = ((scale - U64(1)) << U64(7)) * _LANES if scale >= _SCALE_MIN else _ONLY_ZEROS
            bases[b, 0], bases[b, 1], bases[b, 2], bases[b, 3] = base, base, base, base
            bases[b, 4], bases[b, 5], bases[b, 6], bases[b, 7] = base, base, base, base
        wrong = U64(0)
        for j in range(flat_bases.size):
            codes, faults = _four_codes(bits4[row, j], flat_bases[j])
            out4[row, j] = codes
            wrong |= faults
        if wrong or others:
            col = _search(bits[row], scales[row], code_values, scale_values, out[row])
            if col >= 0:
                result[0], result[1], result[2] = row, col, bits[row, col]
                return INEXACT
    return 0


@inline
def _four_codes(x: np.uint64, base: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Four BF16 (16 bits each) to four FP4 codes (16 bits); the other word is 0 if all are exact.

    The inverse of ``bits(m) = base + 64 * m`` for m >= 2, bits(1) = base, bits(0) = 0: a magnitude
    below the base must be 0; above it, the distance must be a multiple of 64, at most 7 * 64, and
    not 64 itself.
    """
    magnitude = x & _MAGNITUDES
    not_zero = (magnitude + _MAGNITUDES) & _SIGNS
    distance = (magnitude | _SIGNS) - base  # the sign bit stays where magnitude >= base
    reached = distance & _SIGNS
    distance &= reached - (reached >> U64(15))
    q = (distance >> U64(6)) & U64(7) * _LANES
    is_one = q & ~(q >> U64(1)) & ~(q >> U64(2)) & _LANES
    is_zero = ~(q | (q >> U64(1)) | (q >> U64(2))) & _LANES
    infinite = (magnitude + U64(0x80) * _LANES) & _SIGNS
    wrong = (distance & ~(U64(7 << 6) * _LANES)) | is_one | (not_zero & ~reached) | infinite
    m = q + (is_zero & (reached >> U64(15)))
    codes = m | ((x & not_zero) >> U64(12))  # the sign bit to bit 3
    codes = (codes | (codes >> U64(12))) & U64(0x000000FF000000FF)
    return codes | (codes >> U64(24)), wrong


@part
def _search(
    bits: Bits,
    scales: Bytes,
    code_values: NDArray[np.float32],
    scale_values: NDArray[np.float32],
    out: Bytes,
) -> int:
    """One row, value by value, for any scale; returns the first column that has no code, or -1."""
    for col in range(bits.size):
        scale = np.float64(scale_values[scales[col // _BLOCK]])
        value = np.float64(np.uint32(U64(bits[col]) << U64(16)).view(np.float32))
        code = 0
        while code < 16 and code_values[code] * scale != value:
            code += 1
        if code == 16:
            return col
        out[col // 2] = code if col % 2 == 0 else out[col // 2] | (code << 4)
    return -1
