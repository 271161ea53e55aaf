"""FP4 to BF16: ``fp4 * 2^(scale - 127)``, exact for every scale byte up to 252.

A BF16 has FP4's two significant bits and E8M0's exponents. Only at the top they part: 4 and 6 at a
scale of 2^126, and 2 to 6 at 2^127, are beyond BF16. At the bottom BF16's subnormals hold all
values down to 0.5 * 2^-127. Code 8 (-0) becomes +0, as in the published table: so the output is
also the canonical form that the value digest hashes.

Dimensions: R rows, C columns, G = C / group scales per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e8m0
from dsv4_quant.kernels.jit_numba import INEXACT, NAN, U64, expect, inline, kernel, part

Bytes = NDArray[np.uint8]

_BLOCK = 32
"""Columns that are worked on together: 8 words of 4 BF16 values."""

_SCALE_MIN, _SCALE_MAX = 2, 252  # 0.5 * scale is normal, 6 * scale is finite
_BF16_NAN = 0x7FC0

_LANES = U64(0x0001000100010001)
_MAGNITUDES = U64(0x0007000700070007)
_SIGNS = U64(0x0008000800080008)
_NIBBLES = U64(0x000F000F000F000F)


def _value_table() -> NDArray[np.uint32]:
    """``[scale byte, fp4 code]`` -> BF16 bits of the value, with its flags above bit 16."""
    codes = e2m1.VALUES.astype(np.float64)
    codes[8] = 0.0
    values = codes * np.ldexp(1.0, np.arange(256) - e8m0.BIAS)[:, None]
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32) >> np.uint32(16)
    flags = np.where(np.abs(values) < 2.0**128, 0, INEXACT).astype(np.uint32)
    bits[e8m0.NAN], flags[e8m0.NAN] = _BF16_NAN, NAN
    return bits | (flags << np.uint32(16))


_VALUE_TABLE = _value_table()


def fp4_to_bf16(packed: Bytes, scales: Bytes, group: int, out: NDArray[np.uint16]) -> int:
    """Decode a panel.

    Args:
        packed: ``[R, C / 2]``, low nibble first.
        scales: ``[R, G]`` E8M0.
        group: columns per scale, a multiple of 32.
        out: ``[R, C]`` BF16 bits, written; +-inf for a value beyond BF16, 0x7FC0 for NaN.

    Returns:
        INEXACT if a value is beyond BF16, NAN if a scale is 0xFF; both, or 0.
    """
    rows, groups = scales.shape
    cols = groups * group
    if group % _BLOCK:
        raise ValueError(f"a group of {group} columns is no multiple of {_BLOCK}")
    expect("packed", packed, np.uint8, (rows, cols // 2))
    expect("scales", scales, np.uint8, (rows, groups))
    expect("out", out, np.uint16, (rows, cols))
    if group != _BLOCK:  # a wider group is several blocks of the same scale
        scales = scales.repeat(group // _BLOCK, axis=1)
    return _fp4_to_bf16(
        packed, packed.view(np.uint16), scales, _VALUE_TABLE, out, out.view(np.uint64)
    )


@kernel
def _fp4_to_bf16(
    packed: Bytes,
    packed4: NDArray[np.uint16],
    scales: Bytes,
    value_table: NDArray[np.uint32],
    out: NDArray[np.uint16],
    out4: NDArray[np.uint64],
) -> int:
    """``packed4`` and ``out4`` hold 4 codes per element.

    The base is the BF16 of ``0.5 * 2^(scale - 127)``: exponent field scale - 1, mantissa 0.
    """
    rows, blocks = scales.shape
    bases = np.empty((blocks, 8), np.uint64)
    flat_bases = bases.reshape(-1)
    flags = 0
    for row in range(rows):
        others = 0
        for b in range(blocks):
            scale = scales[row, b]
            others += (scale < _SCALE_MIN) | (scale > _SCALE_MAX)
            base = ((U64(scale) - U64(1)) << U64(7)) * _LANES
            bases[b, 0], bases[b, 1], bases[b, 2], bases[b, 3] = base, base, base, base
            bases[b, 4], bases[b, 5], bases[b, 6], bases[b, 7] = base, base, base, base
        for j in range(flat_bases.size):
            out4[row, j] = _four_values(U64(packed4[row, j]), flat_bases[j])
        if others:
            flags |= _look_up(packed[row], scales[row], value_table, out[row])
    return flags


@inline
def _four_values(x: np.uint64, base: np.uint64) -> np.uint64:
    """Four FP4 codes (16 bits) to four BF16, 16 bits each.

    With m the FP4 magnitude code, ``bits(m) = base + 64 * m`` for m >= 2: that puts FP4's exponent
    and mantissa bit where BF16 has them. m = 1 is FP4's subnormal 0.5, the base itself; m = 0 is 0.
    """
    x = (x | (x << U64(24))) & U64(0x000000FF000000FF)
    x = (x | (x << U64(12))) & _NIBBLES
    m = x & _MAGNITUDES
    is_one = m & ~(m >> U64(1)) & ~(m >> U64(2)) & _LANES
    not_zero = (m + _MAGNITUDES) & _SIGNS  # bit 3 of m + 7
    mask = (not_zero << U64(13)) - (not_zero >> U64(3))  # 0xFFFF where m > 0: -0 becomes +0
    return (((x & _SIGNS) << U64(12)) + ((m - is_one) << U64(6)) + base) & mask


@part
def _look_up(
    packed: Bytes, scales: Bytes, value_table: NDArray[np.uint32], out: NDArray[np.uint16]
) -> int:
    """The blocks of one row with the outermost scales, code by code; returns flags."""
    half = _BLOCK // 2
    flags = 0
    for b in range(scales.size):
        if _SCALE_MIN <= scales[b] <= _SCALE_MAX:
            continue
        values = value_table[scales[b]]
        for k in range(b * half, (b + 1) * half):
            even, odd = values[packed[k] & 0x0F], values[packed[k] >> 4]
            out[2 * k], out[2 * k + 1] = even & 0xFFFF, odd & 0xFFFF
            flags |= (even | odd) >> 16
    return flags
