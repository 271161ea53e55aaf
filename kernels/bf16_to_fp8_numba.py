"""BF16 to FP8 where no value changes: one power-of-two scale per tile, or a refusal.

A tile takes the smallest scale 2^s, s >= -127, with ``amax <= 448 * 2^s``. If any scale holds the
tile exactly, this one does:

    Let 2^t hold the tile: every value is c * 2^t with c an E4M3 number. Then amax <= 448 * 2^t, so
    s <= t, because t too is at least -127. If s = t there is nothing to show. If s < t, then
    amax <= 448 * 2^(t-1), so every |c| is at most 224; and 2c is an E4M3 number again: a normal one
    takes the next exponent, which exists up to 2 * 224 = 448, and a subnormal one, k * 2^-9 with
    k < 8, becomes 2k * 2^-9 with 2k < 16. So 2^(t-1) holds the tile as well. Repeat down to s.

    The lower clamp changes nothing: s = -127 is chosen only when amax <= 448 * 2^-127, and there is
    no smaller E8M0 scale that could have served instead.

A tile of zeros is exact with any scale and takes the published quantiser's floor:
``2^ceil(log2(1e-4 / 448))`` = 2^-22. -0 keeps its sign.

Dimensions: R rows, C columns, t x T tiles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.kernels.jit_numba import (
    I64,
    INEXACT,
    NAN,
    U64,
    ceil_div,
    expect,
    inline,
    kernel,
    part,
)

Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint16]
Ints = NDArray[np.int64]

ZERO_TILE_SCALE = 105
"""E8M0 byte of 2^-22: the published quantiser takes no tile for smaller than 1e-4."""

_BLOCK = 32
"""Columns that are worked on together: 8 words of 4 BF16 values."""

_SCALE_MIN = 10  # 2^-9 * scale is a normal BF16
_INFINITY = 0x7F80

_LANES = U64(0x0001000100010001)
_MAGNITUDES = U64(0x7FFF7FFF7FFF7FFF)
_SIGNS = U64(0x8000800080008000)
_ONLY_ZEROS = U64(_INFINITY) * _LANES  # as base: nothing finite reaches it


def fp8_scales_exact(
    bits: Bits, block_rows: int, block_cols: int, out_scales: Bytes, result: Ints
) -> int:
    """The only scales worth trying: the first pass, because scales precede weights in a file.

    Args:
        bits: ``[R, C]`` BF16; the panel begins at the first row of a tile.
        block_rows, block_cols: size of a tile.
        out_scales: ``[ceil(R / block_rows), ceil(C / block_cols)]`` E8M0, written.
        result: ``[3]``: row, column and BF16 bits of the first value at fault, if there is one.

    Returns:
        0, or NAN for an infinity or a NaN; then the work stopped there.
    """
    _check_panel(bits, block_rows, block_cols, out_scales, result)
    return _fp8_scales(bits, block_rows, block_cols, out_scales, result)


def fp8_codes_exact(
    bits: Bits, block_rows: int, block_cols: int, scales: Bytes, out: Bytes, result: Ints
) -> int:
    """The codes under given scales: the second pass.

    Args:
        bits: ``[R, C]`` BF16; the panel begins at the first row of a tile.
        block_rows, block_cols: size of a tile. C and block_cols are multiples of 32 in the fast
            loop; anything else works, slowly.
        scales: ``[ceil(R / block_rows), ceil(C / block_cols)]`` E8M0, none of them 0xFF.
        out: ``[R, C]`` E4M3, written.
        result: ``[3]``: row, column and BF16 bits of the first value at fault, if there is one.

    Returns:
        0, or INEXACT for a value that is no code times its scale; then the work stopped there.
    """
    _check_panel(bits, block_rows, block_cols, scales, result)
    rows, cols = bits.shape
    expect("out", out, np.uint8, (rows, cols))
    fast = cols % _BLOCK == 0 and block_cols % _BLOCK == 0
    width = _BLOCK if fast else 1
    return _fp8_codes(
        bits,
        bits.view(np.uint64) if fast else np.empty((rows, 0), np.uint64),
        scales.repeat(block_cols // width, axis=1)[:, : cols // width].copy(),
        block_rows,
        e4m3.VALUES,
        e8m0.VALUES,
        out,
        out.view(np.uint32) if fast else np.empty((rows, 0), np.uint32),
        result,
    )


def bf16_to_fp8_exact(
    bits: Bits, block_rows: int, block_cols: int, out_scales: Bytes, out: Bytes, result: Ints
) -> int:
    """Both passes over one panel; arguments and status as there."""
    status = fp8_scales_exact(bits, block_rows, block_cols, out_scales, result)
    return status or fp8_codes_exact(bits, block_rows, block_cols, out_scales, out, result)


def _check_panel(bits: Bits, block_rows: int, block_cols: int, scales: Bytes, result: Ints) -> None:
    rows, cols = bits.shape
    expect("bits", bits, np.uint16, (rows, cols))
    expect("scales", scales, np.uint8, (ceil_div(rows, block_rows), ceil_div(cols, block_cols)))
    expect("result", result, np.int64, (3,))


@kernel
def _fp8_scales(
    bits: Bits, block_rows: int, block_cols: int, out_scales: Bytes, result: Ints
) -> int:
    """With amax = 1.f * 2^e: s = e - 8 as long as 1.f <= 1.75, else e - 7. Adding 31 to the BF16
    carries into the exponent field exactly if the 7-bit fraction is above 96: 1.f > 1.75."""
    rows, cols = bits.shape
    maxima = np.empty(cols, np.uint16)
    for strip in range(out_scales.shape[0]):
        for col in range(cols):
            maxima[col] = 0
        for row in range(strip * block_rows, min((strip + 1) * block_rows, rows)):
            for col in range(cols):
                magnitude = bits[row, col] & 0x7FFF
                maxima[col] = magnitude if magnitude > maxima[col] else maxima[col]
        for tile in range(out_scales.shape[1]):
            amax = 0
            for col in range(tile * block_cols, min((tile + 1) * block_cols, cols)):
                amax = max(amax, I64(maxima[col]))
            if amax >= _INFINITY:
                _find_infinite(bits, strip * block_rows, result)
                return NAN
            out_scales[strip, tile] = max(((amax + 31) >> 7) - 8, 0) if amax else ZERO_TILE_SCALE
    return 0


@part
def _find_infinite(bits: Bits, row: int, result: Ints) -> None:
    """The first infinity or NaN from a row on; there is one."""
    col = 0
    while bits[row, col] & 0x7FFF < _INFINITY:
        col += 1
        if col == bits.shape[1]:
            row, col = row + 1, 0
    result[0], result[1], result[2] = row, col, bits[row, col]


@kernel
def _fp8_codes(
    bits: Bits,
    bits4: NDArray[np.uint64],
    scales: Bytes,
    block_rows: int,
    code_values: NDArray[np.float32],
    scale_values: NDArray[np.float32],
    out: Bytes,
    out4: NDArray[np.uint32],
    result: Ints,
) -> int:
    """``bits4`` and ``out4`` hold 4 values per element; they are empty without the fast loop.

    The base is the BF16 of scale * 2^-9, which has code 1: exponent field scale - 9, mantissa 0.
    Where that is not a normal BF16, the fast loop serves zeros only and leaves the rest of the row.
    """
    rows, words = bits4.shape
    bases = np.empty((words // 8, 8), np.uint64)
    flat_bases = bases.reshape(-1)
    others = 1
    for row in range(rows):
        strip = row // block_rows
        if row % block_rows == 0 and words:
            others = 0
            for b in range(bases.shape[0]):
                scale = U64(scales[strip, b])
                others += scale == e8m0.NAN
                base = ((scale - U64(9)) << U64(7)) * _LANES if scale >= _SCALE_MIN else _ONLY_ZEROS
                for k in range(8):
                    bases[b, k] = base
        wrong = U64(0)
        for j in range(flat_bases.size):
            codes, faults = _four_codes(bits4[row, j], flat_bases[j])
            out4[row, j] = codes
            wrong |= faults
        if wrong or others:
            col = _search(bits[row], scales[strip], code_values, scale_values, out[row])
            if col >= 0:
                result[0], result[1], result[2] = row, col, bits[row, col]
                return INEXACT
    return 0


@inline
def _four_codes(x: np.uint64, base: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Four BF16 (16 bits each) to four E4M3 codes (32 bits); the other word is 0 if all are exact.

    With d = magnitude - base, d / 128 counts the binades from that of code 1. From the third on a
    code is normal: ``m = (d - 256) / 16``. Below, it is the significand, 8 ... 15, shifted right by
    1 in binade 2, by 2 in binade 1 and by 3 in binade 0. Every bit that gets lost must be 0.
    """
    magnitude = x & _MAGNITUDES
    not_zero = (magnitude + _MAGNITUDES) & _SIGNS
    d = (magnitude | _SIGNS) - base  # the sign bit stays where magnitude >= base
    reached = d & _SIGNS
    d &= _mask(reached)
    subnormal = _below(d, 3 * 128)
    significand = _mask(subnormal)
    m = (d & (~significand | U64(0x7F) * _LANES)) + (significand & U64(128) * _LANES)
    m = ((m - (~significand & U64(256) * _LANES)) >> U64(4)) & U64(0x07FF) * _LANES
    low_binades = m & _mask(_below(d, 2 * 128))
    m = m - low_binades + (low_binades >> U64(2))
    even_binades = m & _mask(subnormal & ~(d << U64(8)))
    m = m - even_binades + (even_binades >> U64(1))
    lost = (d & U64(15) * _LANES) | (low_binades & U64(3) * _LANES) | (even_binades & _LANES)
    beyond = _SIGNS & ~(_below(d, 256 + 16 * 0x7E + 1) & _below(magnitude, _INFINITY))
    wrong = lost | beyond | (not_zero & ~reached)
    codes = (m & _mask(reached)) | ((x >> U64(8)) & U64(0x80) * _LANES)
    codes = (codes | (codes >> U64(8))) & U64(0x0000FFFF0000FFFF)
    return codes | (codes >> U64(16)), wrong


@inline
def _mask(flags: np.uint64) -> np.uint64:
    """0x7FFF in every lane whose bit 15 is set; the other bits are clear."""
    return flags - (flags >> U64(15))


@inline
def _below(lanes: np.uint64, limit: int) -> np.uint64:
    """Bit 15 of every lane that is smaller than limit; all of them are below 0x8000."""
    return ~((lanes | _SIGNS) - U64(limit) * _LANES) & _SIGNS


@part
def _search(
    bits: Bits,
    scales: Bytes,
    code_values: NDArray[np.float32],
    scale_values: NDArray[np.float32],
    out: Bytes,
) -> int:
    """One row, value by value, for any scale; returns the first column that has no code, or -1."""
    width = bits.size // scales.size
    for col in range(bits.size):
        scale = np.float64(scale_values[scales[col // width]])
        value = np.float64(np.uint32(U64(bits[col]) << U64(16)).view(np.float32))
        code = 0
        while code < 0x7F and code_values[code] * scale < abs(value):
            code += 1
        if code == 0x7F or code_values[code] * scale != abs(value):
            return col
        out[col] = code | ((bits[col] >> 8) & 0x80)
    return -1
