"""FP8 to BF16: ``e4m3 * scale`` per block, with E8M0 or float32 scales.

E4M3 has 4 significant bits and BF16 has 8, so with a power of two as scale only the exponent can
fail to fit: all codes are exact for scales from 2^-124 (in BF16's subnormals) to 2^119, some of
them beyond. Other float32 scales give what the published converter computes: the float32 product,
rounded to BF16 to nearest, ties to even. Whatever is not exact is flagged.

Dimensions: R rows, C columns of the panel; the tensor's scales are [h, w].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.kernels.jit_numba import INEXACT, NAN, U64, ceil_div, expect, inline, kernel, part

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_BLOCK = 32
"""Columns that are worked on together: 8 words of 4 BF16 values."""

_BITS_MIN, _BITS_MAX = 10 << 23, 246 << 23  # 2^-9 * scale is normal, 448 * scale is finite
_BF16_NAN = 0x7FC0

_LANES = U64(0x0001000100010001)
_MAGNITUDES = U64(0x007F007F007F007F)
_SIGNS = U64(0x0080008000800080)
_KEEP_MINUS_ZERO, _CLEAR_MINUS_ZERO = U64(0x8000800080008000), U64(0)


def block_scales(
    codes: Bytes, scales: Bytes | Floats, row0: int, block_rows: int, block_cols: int
) -> Floats:
    """The scales of the block rows that a panel meets, as float32, one per 32 columns.

    One per column where blocks of 32 do not fit; such a panel is decoded without the fast loop.
    """
    rows, cols = codes.shape
    expect("codes", codes, np.uint8, (rows, cols))
    expect("scales", scales, np.float32 if scales.dtype == np.float32 else np.uint8, scales.shape)
    first, last = row0 // block_rows, ceil_div(row0 + rows, block_rows)
    if row0 < 0 or last > scales.shape[0] or scales.shape[1] != ceil_div(cols, block_cols):
        raise ValueError(
            f"scales {list(scales.shape)} do not cover rows {row0} to {row0 + rows} of {cols} "
            f"columns in blocks of {block_rows}x{block_cols}"
        )
    width = _BLOCK if cols % _BLOCK == 0 and block_cols % _BLOCK == 0 else 1
    met = scales[first:last]
    values = met if scales.dtype == np.float32 else e8m0.VALUES.take(met.astype(np.intp))
    if block_cols != width:
        values = values.repeat(block_cols // width, axis=1)[:, : cols // width]
    return np.ascontiguousarray(values, np.float32)


def fp8_to_bf16(
    codes: Bytes,
    scales: Bytes | Floats,
    row0: int,
    block_rows: int,
    block_cols: int,
    out: NDArray[np.uint16],
    canonical: bool = False,
) -> int:
    """Decode a panel.

    Args:
        codes: ``[R, C]`` E4M3.
        scales: ``[h, w]`` of the whole tensor: uint8 is E8M0, float32 is itself.
        row0: the panel's first row in the tensor.
        block_rows, block_cols: size of a block. C and block_cols are multiples of 32 in the fast
            loop; anything else works, slowly.
        out: ``[R, C]`` BF16 bits, written.
        canonical: write -0 as +0, for the value digest; otherwise it keeps its sign.

    Returns:
        INEXACT if some product does not exist in BF16, NAN if a code or a scale is NaN or a scale
        is infinite; both, or 0.
    """
    met = block_scales(codes, scales, row0, block_rows, block_cols)
    rows, cols = codes.shape
    expect("out", out, np.uint16, (rows, cols))
    fast = met.shape[1] * _BLOCK == cols
    return _fp8_to_bf16(
        codes,
        codes.view(np.uint32) if fast else np.empty((rows, 0), np.uint32),
        met,
        met.view(np.uint32),
        row0 % block_rows,
        block_rows,
        e4m3.VALUES,
        _CLEAR_MINUS_ZERO if canonical else _KEEP_MINUS_ZERO,
        out,
        out.view(np.uint64) if fast else np.empty((rows, 0), np.uint64),
    )


@kernel
def _fp8_to_bf16(
    codes: Bytes,
    codes4: NDArray[np.uint32],
    scales: Floats,
    scale_bits: NDArray[np.uint32],
    row0: int,
    block_rows: int,
    values: Floats,
    minus_zero: np.uint64,
    out: NDArray[np.uint16],
    out4: NDArray[np.uint64],
) -> int:
    """``codes4`` and ``out4`` hold 4 codes per element; they are empty without the fast loop."""
    rows, words = codes4.shape
    bases = np.empty((words // 8, 8), np.uint64)
    flat_bases = bases.reshape(-1)
    block_row, others, flags = -1, True, 0
    for row in range(rows):
        if (row0 + row) // block_rows != block_row:
            block_row = (row0 + row) // block_rows
            others = words == 0 or _fill_bases(scale_bits[block_row], bases)
        nan = U64(0)
        for j in range(flat_bases.size):
            x = U64(codes4[row, j])
            nan |= ((x & U64(0x7F7F7F7F)) + U64(0x01010101)) & U64(0x80808080)
            out4[row, j] = _four_values(x, flat_bases[j], minus_zero)
        if nan or others:
            flags |= _multiply(
                codes[row], scales[block_row], scale_bits[block_row], nan != 0, values, minus_zero,
                out[row],
            )  # fmt: skip
    return flags


@inline
def _has_base(scale: np.uint32) -> bool:
    """Whether a float32 scale is a power of two with which all products are normal BF16."""
    return bool((scale & 0x007FFFFF == 0) & (scale >= _BITS_MIN) & (scale <= _BITS_MAX))


@part
def _fill_bases(scale_bits: NDArray[np.uint32], bases: NDArray[np.uint64]) -> bool:
    """The bases of one block row for :func:`_four_values`; returns whether some scale has none.

    The base is the BF16 of ``scale * 2^-7``: what code 0 would be, had FP8 no subnormals.
    """
    others = False
    for b in range(scale_bits.size):
        others |= not _has_base(scale_bits[b])
        base = ((U64(scale_bits[b] >> 23) - U64(7)) << U64(7)) * _LANES
        bases[b, 0], bases[b, 1], bases[b, 2], bases[b, 3] = base, base, base, base
        bases[b, 4], bases[b, 5], bases[b, 6], bases[b, 7] = base, base, base, base
    return others


@inline
def _four_values(x: np.uint64, base: np.uint64, minus_zero: np.uint64) -> np.uint64:
    """Four E4M3 codes (32 bits) to four BF16, 16 bits each.

    A normal code's magnitude m is ``base + 16 * m``: that puts exponent and mantissa where BF16 has
    them. A subnormal one, m < 8, is first shifted left until it is not, and the exponent (128 in
    BF16's bits) lowered by one per step. Every lane stays within its 16 bits: base >= 3 * 128.
    """
    x = (x | (x << U64(16))) & U64(0x0000FFFF0000FFFF)
    x = (x | (x << U64(8))) & U64(0x00FF00FF00FF00FF)
    m = x & _MAGNITUDES
    not_zero = (m + _MAGNITUDES) & _SIGNS
    below_4 = ~(m + U64(0x7C) * _LANES) & _SIGNS
    low = m & (below_4 - (below_4 >> U64(7)))
    m = m + (low << U64(2)) - low  # two steps
    below_8 = ~(m + U64(0x78) * _LANES) & _SIGNS
    m = m + (m & (below_8 - (below_8 >> U64(7))))  # one step
    bits = (m << U64(4)) + base - (below_4 << U64(1)) - below_8
    mask = (not_zero << U64(9)) - (not_zero >> U64(7))  # 0xFFFF where the magnitude is not 0
    return (bits + ((x & _SIGNS) << U64(8))) & (mask | minus_zero)


@part
def _multiply(
    codes: Bytes,
    scales: Floats,
    scale_bits: NDArray[np.uint32],
    every: bool,
    values: Floats,
    minus_zero: np.uint64,
    out: NDArray[np.uint16],
) -> int:
    """The blocks of one row that have no base, or every one; returns flags.

    The product is exact in float64; then it is rounded to float32 and to BF16.
    """
    flags = 0
    width = codes.size // scales.size
    for b in range(scales.size):
        if not every and width > 1 and _has_base(scale_bits[b]):
            continue
        for col in range(b * width, (b + 1) * width):
            product = np.float64(values[codes[col]]) * np.float64(scales[b])
            bits = np.float32(product).view(np.uint32)
            rounded = U64((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
            if not abs(product) < np.inf:
                flags |= NAN
                rounded = U64(_BF16_NAN)
            elif np.float64(np.uint32(rounded << U64(16)).view(np.float32)) != product:
                flags |= INEXACT
            out[col] = rounded if rounded & U64(0x7FFF) else rounded & minus_zero
    return flags
