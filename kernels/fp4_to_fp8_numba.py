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

_BLOCK = 32
"""Columns that are worked on together: 16 packed bytes, two words in and four out."""

_E_MIN, _E_MAX = -20, 15  # where all non-zero codes are flushed, and where all saturate
_E_NORMAL = -5  # from here on even 0.5 * 2^e is a normal FP8 number

_BYTES = U64(0x0101010101010101)
_MAGNITUDES = U64(0x0707070707070707)
_SIGNS = U64(0x0808080808080808)
_LOW_NIBBLES = U64(0x0F0F0F0F0F0F0F0F)
_PACKED_MAGNITUDES = U64(0x7777777777777777)


def _code_table() -> NDArray[np.uint16]:
    """``[e - E_MIN, fp4 code]`` -> FP8 code of ``fp4 * 2^e``, plus 0x100 where it is not exact.

    The last row is the one for S = NaN.
    """
    values = e2m1.VALUES.astype(np.float64)
    values[8] = 0.0
    scaled = np.ldexp(values, np.arange(_E_MIN, _E_MAX + 1)[:, None]).astype(np.float32)
    codes = e4m3.encode(scaled)
    table = codes + np.where(e4m3.VALUES[codes] == scaled, 0, 0x100).astype(np.uint16)
    return np.vstack([table, np.full_like(table[:1], e4m3.NAN_CODES[0])])


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
        group: columns per scale, a multiple of 32.
        block_rows, block_cols: size of a tile; block_cols is a multiple of group.
        out: ``[R, C]`` E4M3, written; a tile with a scale of 0xFF becomes NaN as a whole.
        spreads: ``[256]``, counted up: per tile max - min of the scale bytes over the blocks that
            hold a non-zero code; 0 for a tile of zeros.
        result: ``[5]``, written when the status is not EXACT: row and column of the first inexact
            tile (row-major), the reason, the smallest scale byte of its non-zero blocks (255
            without one) and the largest of all its blocks.

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
    if group != _BLOCK:  # a wider group is several blocks of the same scale
        scales = scales.repeat(group // _BLOCK, axis=1)
    return _fp4_to_fp8(
        packed,
        packed.view(np.uint32),
        packed.view(np.uint64).reshape(rows, cols // _BLOCK, 2),
        scales,
        out_scales,
        block_rows,
        block_cols // _BLOCK,
        _CODE_TABLE,
        out,
        out.view(np.uint64),
        spreads,
        result,
    )


def _check_tiles(group: int, block_cols: int) -> None:
    if group % _BLOCK or block_cols % group:
        raise ValueError(f"groups of {group} columns do not fit tiles of {block_cols} columns")


@kernel
def _fp8_scales(scales: Bytes, block_rows: int, tile_groups: int, out: Bytes) -> None:
    low, high = np.empty(out.shape[1], np.int64), np.empty(out.shape[1], np.int64)
    for strip in range(out.shape[0]):
        first, last = strip * block_rows, min((strip + 1) * block_rows, scales.shape[0])
        _extremes(scales, first, last, tile_groups, low, high)
        for tile in range(high.size):
            top = high[tile]
            out[strip, tile] = top if top == e8m0.NAN else max(top - HEADROOM, 0)


@part
def _extremes(
    scales: Bytes, first: int, last: int, tile_groups: int, low: Ints, high: Ints
) -> None:
    """The smallest and the largest scale byte of every tile in the rows first ... last - 1."""
    groups = scales.shape[1]
    smallest, largest = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    for g in range(groups):
        smallest[g], largest[g] = 255, 0
    for row in range(first, last):
        for g in range(groups):
            scale = scales[row, g]
            smallest[g] = scale if scale < smallest[g] else smallest[g]
            largest[g] = scale if scale > largest[g] else largest[g]
    for tile in range(low.size):
        low[tile], high[tile] = 255, 0
        for g in range(tile * tile_groups, min((tile + 1) * tile_groups, groups)):
            low[tile] = min(low[tile], I64(smallest[g]))
            high[tile] = max(high[tile], I64(largest[g]))


@kernel
def _fp4_to_fp8(
    packed: Bytes,
    packed8: NDArray[np.uint32],
    words: NDArray[np.uint64],
    scales: Bytes,
    out_scales: Bytes,
    block_rows: int,
    tile_blocks: int,
    code_table: NDArray[np.uint16],
    out: Bytes,
    out8: NDArray[np.uint64],
    spreads: Ints,
    result: Ints,
) -> int:
    """The arrays come in several widths: ``packed8`` and ``out8`` hold 8 codes per element and
    ``words[row, block]`` the 32 codes of a block."""
    strips, tiles = out_scales.shape
    low, high, top = np.empty(tiles, np.int64), np.empty(tiles, np.int64), np.empty(tiles, np.int64)
    status = EXACT
    for strip in range(strips):
        first, last = strip * block_rows, min((strip + 1) * block_rows, scales.shape[0])
        _extremes(scales, first, last, tile_blocks, low, top)
        if _ordinary(packed8, words, scales, out_scales[strip], first, last, tile_blocks, out8):
            _live_extremes(words, scales, first, last, tile_blocks, low, high)
        else:
            for tile in range(tiles):
                high[tile] = top[tile]
        for tile in range(tiles):
            S = I64(out_scales[strip, tile])
            lost = False
            if S == e8m0.NAN or low[tile] - S < _E_NORMAL or high[tile] - S > HEADROOM:
                lost = _look_up(packed, scales, S, first, last, tile, tile_blocks, code_table, out)
            spreads[max(high[tile] - low[tile], 0)] += 1
            reason = _judge(low[tile], top[tile], lost)
            if reason != EXACT and status == EXACT:
                status = reason
                result[0], result[1], result[2] = strip, tile, reason
                result[3], result[4] = low[tile], top[tile]
    return status


@part
def _ordinary(
    packed8: NDArray[np.uint32],
    words: NDArray[np.uint64],
    scales: Bytes,
    out_scales: Bytes,
    first: int,
    last: int,
    tile_blocks: int,
    out8: NDArray[np.uint64],
) -> int:
    """Some rows as if every block had a normal base; returns how many blocks hold only zeros.

    The base is the FP8 code of ``0.5 * 2^e``, e = scale - S: exponent field e - 1 + 7, mantissa 0.
    """
    blocks = scales.shape[1]
    offsets, bases = np.empty(blocks, np.uint64), np.empty((blocks, 4), np.uint64)
    for b in range(blocks):
        offsets[b] = U64((6 - I64(out_scales[b // tile_blocks])) << 3) * _BYTES
    flat_bases = bases.reshape(-1)
    zero_blocks = 0
    for row in range(first, last):
        for b in range(blocks):
            zero_blocks += (words[row, b, 0] | words[row, b, 1]) & _PACKED_MAGNITUDES == U64(0)
            base = (U64(scales[row, b]) << U64(3)) * _BYTES + offsets[b]
            bases[b, 0], bases[b, 1], bases[b, 2], bases[b, 3] = base, base, base, base
        for j in range(flat_bases.size):
            out8[row, j] = _eight_codes(U64(packed8[row, j]), flat_bases[j])
    return zero_blocks


@inline
def _eight_codes(x: np.uint64, base: np.uint64) -> np.uint64:
    """Eight FP4 codes (32 bits) to eight FP8 codes, one per byte.

    With m the FP4 magnitude code, ``code(m) = base + 4 * m`` for m >= 2: 4 * m puts FP4's exponent
    and mantissa bit where FP8 has them. m = 1 is FP4's subnormal 0.5, the base itself; m = 0 is 0.
    At most 96 + 28 per byte: nothing carries into the next one.
    """
    x = (x | (x << U64(16))) & U64(0x0000FFFF0000FFFF)
    x = (x | (x << U64(8))) & U64(0x00FF00FF00FF00FF)
    x = (x | (x << U64(4))) & _LOW_NIBBLES
    m = x & _MAGNITUDES
    is_one = m & ~(m >> U64(1)) & ~(m >> U64(2)) & _BYTES
    not_zero = (m + _MAGNITUDES) & _SIGNS  # bit 3 of m + 7
    mask = (not_zero << U64(5)) - (not_zero >> U64(3))  # 0xFF where m > 0: -0 becomes +0
    return (((x & _SIGNS) << U64(4)) + ((m - is_one) << U64(2)) + base) & mask


@part
def _live_extremes(
    words: NDArray[np.uint64],
    scales: Bytes,
    first: int,
    last: int,
    tile_blocks: int,
    low: Ints,
    high: Ints,
) -> None:
    """Like :func:`_extremes`, over the blocks that hold a non-zero code; 255 and 0 without one."""
    for tile in range(low.size):
        low[tile], high[tile] = 255, 0
    for row in range(first, last):
        for b in range(scales.shape[1]):
            if (words[row, b, 0] | words[row, b, 1]) & _PACKED_MAGNITUDES:
                tile, scale = b // tile_blocks, I64(scales[row, b])
                low[tile], high[tile] = min(low[tile], scale), max(high[tile], scale)


@part
def _look_up(
    packed: Bytes,
    scales: Bytes,
    S: int,
    first: int,
    last: int,
    tile: int,
    tile_blocks: int,
    code_table: NDArray[np.uint16],
    out: Bytes,
) -> bool:
    """The blocks of one tile that have no normal base, code by code; whether a value is lost."""
    half = _BLOCK // 2
    lost = False
    for row in range(first, last):
        for b in range(tile * tile_blocks, min((tile + 1) * tile_blocks, scales.shape[1])):
            e = I64(scales[row, b]) - S
            if _E_NORMAL <= e <= HEADROOM and S != e8m0.NAN:
                continue
            codes = code_table[-1 if S == e8m0.NAN else min(max(e, _E_MIN), _E_MAX) - _E_MIN]
            for k in range(b * half, (b + 1) * half):
                even, odd = codes[packed[row, k] & 0x0F], codes[packed[row, k] >> 4]
                out[row, 2 * k], out[row, 2 * k + 1] = even & 0xFF, odd & 0xFF
                lost |= (even | odd) > 0xFF
    return lost


@inline
def _judge(low: int, top: int, lost: bool) -> int:
    """Why a tile is not exact; ``low == 255`` says that it holds no non-zero code."""
    if top == e8m0.NAN:
        return NAN_SCALE
    if top < HEADROOM and low < e8m0.NAN:
        return UNDERFLOW
    return SPREAD if lost else EXACT
