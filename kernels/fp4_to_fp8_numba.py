"""FP4 to FP8: panels of FP4 codes with one scale per 1 x group, to FP8 with one scale per tile.

The rule is the published converter's. A tile takes the scale S = (largest scale in the tile) / 2^6
and a value becomes the FP8 code of ``fp4 * 2^(scale - S)``: in the block with the largest scale
6 becomes 6 * 64 = 384 <= 448. A block whose scale is d steps smaller than the largest is exact

- for d <= 11, with normal FP8 numbers only: this is the fast loop;
- for d <= 14 through FP8 subnormals: 0.5 * 2^(6 - 14) = 2^-9 is the smallest of them;
- beyond that for as long as the codes that do occur survive: 6 = 3 * 2 until d = 16, 4 until 17.

Everything else is reported, never rounded in silence. FP4 code 8 (-0) becomes +0 as published.

Dimensions: R rows, C columns, G = C / group scales per row, t x T tiles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.kernels.jit_numba import I64, U64, ceil_div, expect, inline, kernel, part

EXACT = 0
SPREAD = 1
"""Reason: a non-zero code is too small beside the tile's largest scale."""
UNDERFLOW = 2
"""Reason: a non-zero code, and S would be smaller than 2^-127, the smallest E8M0."""
NAN_SCALE = 3
"""Reason: a scale byte of the tile is 0xFF."""

HEADROOM = 6
"""S is 2^6 below the largest scale."""

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_E_MIN, _E_MAX = -20, 15  # beyond: every non-zero code is flushed, or saturates
_NORMAL_MIN = -5  # e >= -5: even 0.5 * 2^e is a normal FP8 number
_NAN_CODE = e4m3.NAN_CODES[0]

_BYTES = U64(0x0101010101010101)
_MAGNITUDES = U64(0x0707070707070707)
_SIGNS = U64(0x0808080808080808)
_NIBBLES = U64(0x0F0F0F0F0F0F0F0F)
_PACKED_MAGNITUDES = U64(0x7777777777777777)


def _code_table() -> NDArray[np.uint16]:
    """``[e - E_MIN, fp4 code]`` -> FP8 code of ``fp4 * 2^e``, plus 0x100 where it is not exact."""
    values = e2m1.VALUES.astype(np.float64)
    values[8] = 0.0
    scaled = np.ldexp(values, np.arange(_E_MIN, _E_MAX + 1)[:, None]).astype(np.float32)
    codes = e4m3.encode(scaled)
    return codes + np.where(e4m3.VALUES[codes] == scaled, 0, 0x100).astype(np.uint16)


_CODE_TABLE = _code_table()


def fp8_scales(scales: Bytes, group: int, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The tiles' FP8 scales: ``max(scale bytes) - 6``, at least 0; 0xFF where one is 0xFF.

    Args:
        scales: ``[R, G]`` E8M0; the panel begins at the first row of a tile.
        group: columns per scale.
        block_rows, block_cols: size of a tile; block_cols is a multiple of group.
        out: ``[ceil(R / block_rows), ceil(C / block_cols)]`` E8M0, written.
    """
    rows, groups = scales.shape
    _check_tiles(group, block_cols)
    expect("scales", scales, np.uint8, (rows, groups))
    tiles = ceil_div(rows, block_rows), ceil_div(groups * group, block_cols)
    expect("out", out, np.uint8, tiles)
    _fp8_scales(scales, block_rows, block_cols // group, out)


def fp4_to_fp8(
    packed: Bytes,
    scales: Bytes,
    out_scales: Bytes,
    group: int,
    block_rows: int,
    block_cols: int,
    out: Bytes,
    spreads: Ints,
    result: Ints,
) -> int:
    """FP8 codes of ``fp4 * 2^(scale - S)``.

    Args:
        packed: ``[R, C / 2]``, low nibble first; the panel begins at the first row of a tile.
        scales: ``[R, G]`` E8M0.
        out_scales: ``[t, T]``, what :func:`fp8_scales` wrote for this panel.
        group: columns per scale, a multiple of 16.
        block_rows, block_cols: size of a tile; block_cols is a multiple of group.
        out: ``[R, C]`` E4M3, written; a tile with a scale of 0xFF becomes NaN as a whole.
        spreads: ``[256]``, counted up: per tile max - min of the scale bytes over the blocks that
            hold a non-zero code; 0 for a tile of zeros.
        result: ``[5]``, written when the status is not EXACT: row and column of the first inexact
            tile (row-major), the reason, the smallest scale byte of its non-zero blocks (of all
            blocks if all are zero) and the largest of all its blocks.

    Returns:
        EXACT, or the reason of the first inexact tile.
    """
    rows, groups = scales.shape
    cols = groups * group
    _check_tiles(group, block_cols)
    tiles = ceil_div(rows, block_rows), ceil_div(cols, block_cols)
    expect("packed", packed, np.uint8, (rows, cols // 2))
    expect("scales", scales, np.uint8, (rows, groups))
    expect("out_scales", out_scales, np.uint8, tiles)
    expect("out", out, np.uint8, (rows, cols))
    expect("spreads", spreads, np.int64, (256,))
    expect("result", result, np.int64, (5,))
    tile_groups = block_cols // group
    return _fp4_to_fp8(
        packed, scales, out_scales, block_rows, tile_groups, _CODE_TABLE, out, spreads, result
    )


def _check_tiles(group: int, block_cols: int) -> None:
    if group % 16 or block_cols % group:
        raise ValueError(f"groups of {group} columns do not fit tiles of {block_cols} columns")


@kernel
def _fp8_scales(scales: Bytes, block_rows: int, tile_groups: int, out: Bytes) -> None:
    rows, groups = scales.shape
    largest = np.empty(groups, np.uint8)
    for strip in range(out.shape[0]):
        largest[:] = 0
        for row in range(strip * block_rows, min((strip + 1) * block_rows, rows)):
            for g in range(groups):
                largest[g] = max(largest[g], scales[row, g])
        for tile in range(out.shape[1]):
            top = largest[tile * tile_groups : (tile + 1) * tile_groups].max()
            out[strip, tile] = top if top == e8m0.NAN else max(I64(top) - HEADROOM, 0)


@kernel
def _fp4_to_fp8(
    packed: Bytes,
    scales: Bytes,
    out_scales: Bytes,
    block_rows: int,
    tile_groups: int,
    code_table: NDArray[np.uint16],
    out: Bytes,
    spreads: Ints,
    result: Ints,
) -> int:
    rows, tiles = scales.shape[0], out_scales.shape[1]
    words, packed8, out8 = packed.view(np.uint64), packed.view(np.uint32), out.view(np.uint64)
    bases = np.empty(out8.shape[1], np.uint64)
    low, high, top = np.empty(tiles, np.int64), np.empty(tiles, np.int64), np.empty(tiles, np.int64)
    lost = np.empty(tiles, np.bool_)
    status = EXACT
    for strip in range(out_scales.shape[0]):
        low[:], high[:], top[:], lost[:] = 255, 0, 0, False
        for row in range(strip * block_rows, min((strip + 1) * block_rows, rows)):
            ordinary = _prepare_row(
                words[row], scales[row], out_scales[strip], tile_groups, bases, low, high, top
            )
            for j in range(bases.size):
                out8[row, j] = _eight_codes(U64(packed8[row, j]), bases[j])
            if not ordinary:
                _look_up_row(
                    packed[row], scales[row], out_scales[strip], tile_groups, code_table,
                    out[row], lost,
                )  # fmt: skip
        for tile in range(tiles):
            spreads[max(high[tile] - low[tile], 0)] += 1
            reason = _judge(low[tile], top[tile], lost[tile])
            if reason != EXACT and status == EXACT:
                status = reason
                result[0], result[1], result[2] = strip, tile, reason
                result[3], result[4] = low[tile], top[tile]
    return status


@part
def _prepare_row(
    words: NDArray[np.uint64],
    scales: Bytes,
    out_scales: Bytes,
    tile_groups: int,
    bases: NDArray[np.uint64],
    low: Ints,
    high: Ints,
    top: Ints,
) -> bool:
    """The bases of one row for :func:`_eight_codes`, and its part of the tiles' statistics.

    The base is the FP8 code of ``0.5 * 2^e``, e = scale - S: exponent field e - 1 + 7, mantissa 0.
    Returns whether it is a normal number all along the row.
    """
    group_words, group_bases = words.size // scales.size, bases.size // scales.size
    ordinary = True
    for tile in range(out_scales.size):
        largest = I64(out_scales[tile])
        ordinary &= largest != e8m0.NAN
        lo, hi, mx = low[tile], high[tile], top[tile]
        for g in range(tile * tile_groups, min((tile + 1) * tile_groups, scales.size)):
            bits = U64(0)
            for k in range(g * group_words, (g + 1) * group_words):
                bits |= words[k]
            scale = I64(scales[g])
            mx = max(mx, scale)
            if bits & _PACKED_MAGNITUDES:
                lo, hi = min(lo, scale), max(hi, scale)
            e = scale - largest
            ordinary &= _NORMAL_MIN <= e <= HEADROOM
            base = U64((e + 6) << 3) * _BYTES
            for k in range(g * group_bases, (g + 1) * group_bases):
                bases[k] = base
        low[tile], high[tile], top[tile] = lo, hi, mx
    return ordinary


@inline
def _eight_codes(x: np.uint64, base: np.uint64) -> np.uint64:
    """Eight FP4 codes (32 bits) to eight FP8 codes, one per byte.

    With m the FP4 magnitude code, ``code(m) = base + 4 * m`` for m >= 2: 4 * m puts FP4's exponent
    and mantissa bit where FP8 has them. m = 1 is FP4's subnormal 0.5, the base itself; m = 0 is 0.
    At most 96 + 28 per byte: nothing carries into the next one.
    """
    x = (x | (x << U64(16))) & U64(0x0000FFFF0000FFFF)
    x = (x | (x << U64(8))) & U64(0x00FF00FF00FF00FF)
    x = (x | (x << U64(4))) & _NIBBLES
    m = x & _MAGNITUDES
    is_one = m & ~(m >> U64(1)) & ~(m >> U64(2)) & _BYTES
    not_zero = (m + _MAGNITUDES) & _SIGNS  # bit 3 of m + 7
    mask = (not_zero << U64(5)) - (not_zero >> U64(3))  # 0xFF where m > 0: -0 becomes +0
    return (((x & _SIGNS) << U64(4)) + ((m - is_one) << U64(2)) + base) & mask


@part
def _look_up_row(
    packed: Bytes,
    scales: Bytes,
    out_scales: Bytes,
    tile_groups: int,
    code_table: NDArray[np.uint16],
    out: Bytes,
    lost: NDArray[np.bool_],
) -> None:
    """The blocks of one row that have no normal base, code by code; marks tiles that lose one."""
    half = packed.size // scales.size
    for g in range(scales.size):
        tile = g // tile_groups
        e = I64(scales[g]) - I64(out_scales[tile])
        if out_scales[tile] == e8m0.NAN:
            out[2 * g * half : 2 * (g + 1) * half] = _NAN_CODE
        elif not _NORMAL_MIN <= e <= HEADROOM:
            codes = code_table[min(max(e, _E_MIN), _E_MAX) - _E_MIN]
            for k in range(g * half, (g + 1) * half):
                even, odd = codes[packed[k] & 0x0F], codes[packed[k] >> 4]
                out[2 * k], out[2 * k + 1] = even & 0xFF, odd & 0xFF
                lost[tile] |= (even | odd) > 0xFF


@inline
def _judge(low: int, top: int, lost: bool) -> int:
    """Why a tile is not exact; ``low == 255`` says that it holds no non-zero code."""
    if top == e8m0.NAN:
        return NAN_SCALE
    if top < HEADROOM and low < e8m0.NAN:
        return UNDERFLOW
    return SPREAD if lost else EXACT
