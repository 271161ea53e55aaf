"""float32 to BF16 by rounding, nearest even: a lossy cast without blocks and scales.

For the figures, a row is a block. A finite value that would round to infinity is refused, as
infinities and NaN are.

Dimensions: R rows, C columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.kernels.figures import EXACT, FLUSHED, Figures
from dsv4_quant.kernels.jit_numba import NAN, expect, inline, kernel, part
from dsv4_quant.kernels.quantise_blocks_numba import float_bits

U32, F32, F64 = np.uint32, np.float32, np.float64
Bits = NDArray[Any]  # BF16 as uint16, float32 as uint32
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

_ZERO, _ONE = U32(0), U32(1)
_MAGNITUDE, _INFINITY = U32(0x7FFFFFFF), U32(0x7F800000)
_JUST_BELOW_HALF = U32(0x7FFF)


def round_bf16(
    values: NDArray[Any], out: NDArray[np.uint16], figures: Figures | None, result: Ints
) -> int:
    """Round a panel.

    Args:
        values: ``[R, C]`` float32; or BF16 bits as uint16, which stay what they are.
        out: ``[R, C]`` BF16 bits, written.
        figures: of R rows, written; None where nobody asks.
        result: ``[3]``: row, column and bits of the first value that is refused, if there is one.

    Returns:
        0, or NAN for an infinity, a NaN or a value of ``2**128 - 2**119`` or more; then the work
        stopped there, and what was written, the figures too, is of no use.
    """
    bits, shift = float_bits(values)
    expect("out", out, np.uint16, bits.shape)
    expect("result", result, np.int64, (3,))
    if figures is None:
        figures = Figures.empty(0)
    else:
        figures.begin(bits.shape[0], values=bits.size, blocks=bits.shape[0])
    return _round_bf16(
        bits,
        shift,
        out,
        figures.value_squares,
        figures.error_squares,
        figures.largest_error,
        figures.counts,
        result,
    )


@kernel
def _round_bf16(
    bits: Bits,
    shift: np.uint32,
    out: NDArray[np.uint16],
    value_squares: Doubles,
    error_squares: Doubles,
    largest_error: Floats,
    counts: Ints,
    result: Ints,
) -> int:
    """The arrays of the figures are empty unless they are wanted."""
    rows, cols = bits.shape
    size = 2
    while size < cols:
        size *= 2
    magnitudes, errors = np.zeros(size, np.float32), np.zeros(size, np.float32)
    squares = np.empty(size // 2)
    for row in range(rows):
        highest, largest, flushed = _round_row(bits[row], shift, out[row], magnitudes, errors)
        if highest >= _INFINITY:
            result[0] = row
            _find_refused(bits[row], shift, result)
            return NAN
        if value_squares.size:
            value_squares[row] = _sum_squares(magnitudes, squares)
            error_squares[row] = _sum_squares(errors, squares)
            largest_error[0] = max(largest_error[0], _as_float(largest))
            counts[FLUSHED] += flushed
            counts[EXACT] += error_squares[row] == 0
    return 0


@part
def _round_row(
    bits: Bits, shift: np.uint32, out: NDArray[np.uint16], magnitudes: Floats, errors: Floats
) -> tuple[np.uint32, np.uint32, np.uint32]:
    """Returns bits of the largest rounded magnitude and error, and how many were flushed."""
    highest, largest, flushed = _ZERO, _ZERO, _ZERO
    for i in range(bits.size):
        value = U32(U32(bits[i]) << (shift & U32(31)))
        magnitude = U32(value & _MAGNITUDE)
        rounded = _rounded(magnitude)
        out[i] = (rounded | (value & ~_MAGNITUDE)) >> 16
        error = _as_float(magnitude) - _as_float(rounded)  # exact: it fits the bits that went
        magnitudes[i], errors[i] = _as_float(magnitude), error
        error_bits = U32(F32(error).view(np.uint32) & _MAGNITUDE)
        highest = highest if highest > rounded else rounded
        largest = largest if largest > error_bits else error_bits
        flushed = U32(flushed + (_ONE if (rounded == 0) & (magnitude > 0) else _ZERO))
    return highest, largest, flushed


@inline
def _rounded(magnitude: np.uint32) -> np.uint32:
    """The nearest magnitude with 16 zeros below; of a tie, the even one."""
    odd = U32(U32(magnitude >> U32(16)) & _ONE)
    return U32(U32(magnitude + _JUST_BELOW_HALF + odd) & U32(0xFFFF0000))


@inline
def _as_float(bits: np.unsignedinteger[Any]) -> np.float32:
    return U32(bits).view(np.float32)


@part
def _sum_squares(x: Floats, squares: Doubles) -> np.float64:
    """By halves, in float64; x is filled up with zeros."""
    n = squares.size
    for i in range(n):
        squares[i] = F64(x[i]) * F64(x[i]) + F64(x[i + n]) * F64(x[i + n])
    while n > 1:
        n //= 2
        for i in range(n):
            squares[i] += squares[i + n]
    return F64(squares[0])


@part
def _find_refused(bits: Bits, shift: np.uint32, result: Ints) -> None:
    """The first in a row that has one."""
    col = 0
    while _rounded(U32(U32(bits[col]) << (shift & U32(31))) & _MAGNITUDE) < _INFINITY:
        col += 1
    result[1], result[2] = col, bits[col]
