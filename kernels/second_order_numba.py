"""Weights to FP4 or FP8 under given scales, so that outputs change least: second-order rounding.

The method, its sources and what a Factor is: ``second_order_factor_numba``. The scales are those
of plain rounding, so calibration changes codes only. Per value:

    v = w + gains . r          where the errors before are best made up for
    q = the grid point nearest to v / S, ties to the even code, saturating, times S
    r = r + x (w - q)          the output error so far; saturation is an error like any other

Where no value changes, r stays 0 and every code is that of plain rounding: what is on the grid
comes back. Rows of a weight do not know each other, so panels, threads and the number of rows
change no bit.

R rows, C columns, LANES rows side by side in vector registers, B = BLOCK columns that are rounded
before r is brought up to date: meanwhile ``within`` says what their errors do to each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.kernels.jit_numba import I64, NAN, ceil_div, expect, kernel, part
from dsv4_quant.kernels.second_order_factor_numba import BLOCK, Factor

LANES = 64

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def round_fp4(values: Floats, scales: Bytes, group: int, factor: Factor, out: Bytes) -> int:
    """FP4 codes under given scales, low nibble first; a zero is always +0.

    Args:
        values: ``[R, C]``.
        scales: ``[R, ceil(C / group)]`` E8M0.
        group: columns that share a scale.
        factor: of the inputs that the weight sees, C columns.
        out: ``[R, C / 2]``, written.

    Returns:
        0, or NAN where a value is infinite or NaN, or a scale NaN; then nothing is written.
    """
    rows, cols = values.shape
    codes = np.empty((rows, cols), np.uint8)
    expect("out", out, np.uint8, (rows, cols // 2))
    status = _round_checked(values, scales, (1, group), factor, codes, is_fp4=True)
    if not status:
        np.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4, out=out)
    return status


def round_fp8(
    values: Floats, scales: Bytes, block: tuple[int, int], factor: Factor, out: Bytes
) -> int:
    """FP8 codes under given scales; a negative value that rounds to zero is -0.

    Args:
        values: ``[R, C]``; the first row begins a block.
        scales: ``[ceil(R / b), ceil(C / c)]`` E8M0.
        block: rows b and columns c that share a scale.
        factor: of the inputs that the weight sees, C columns.
        out: ``[R, C]``, written.

    Returns:
        0, or NAN where a value is infinite or NaN, or a scale NaN; then nothing is written.
    """
    return _round_checked(values, scales, block, factor, out, is_fp4=False)


def _round_checked(
    values: Floats,
    scales: Bytes,
    block: tuple[int, int],
    factor: Factor,
    out: Bytes,
    *,
    is_fp4: bool,
) -> int:
    rows, cols = values.shape
    expect("values", values, np.float32, (rows, cols))
    expect("scales", scales, np.uint8, (ceil_div(rows, block[0]), ceil_div(cols, block[1])))
    expect("order", factor.order, np.int64, (cols,))
    expect("out", out, np.uint8, (rows, cols))
    if (scales == e8m0.NAN).any() or not np.isfinite(values).all():
        return NAN
    spread = e8m0.VALUES[scales]
    order, inputs, gains, within, _ = factor
    _round(values, spread, *block, order, inputs, gains, within, is_fp4, out)
    return 0


@kernel
def _round(
    values: Floats,
    scales: Floats,
    b: int,
    c: int,
    order: Ints,
    inputs: Floats,
    gains: Floats,
    within: Floats,
    is_fp4: bool,
    out: Bytes,
) -> None:
    """A row of the arrays here is a column of the weight: of LANES rows at a time."""
    rows, cols = values.shape
    w, grid = np.empty((cols, LANES), np.float32), np.empty((cols, LANES), np.float32)
    steps = np.empty((scales.shape[1], LANES), np.float32)
    r = np.empty((inputs.shape[0], LANES), np.float32)
    moved, errors = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    sizes = np.empty(LANES, np.float32)
    for first in range(0, rows, LANES):
        _load(values, scales, first, b, w, steps)
        r[:] = 0
        for start in range(0, cols, BLOCK):
            count = min(BLOCK, cols - start)
            moved[:] = 0
            _add_product(gains[start : start + count], r, moved)
            for j in range(count):
                col = order[start + j]
                scale, target, error = steps[col // c], moved[j], errors[j]
                for lane in range(LANES):  # where nothing moves, -0 stays -0
                    held = w[col, lane]
                    target[lane] = held + target[lane] if target[lane] != 0 else held
                    sizes[lane] = abs(target[lane]) / scale[lane]
                if is_fp4:
                    _to_grid_fp4(sizes)
                else:
                    _to_grid_fp8(sizes)
                for lane in range(LANES):
                    grid[col, lane] = np.copysign(sizes[lane], target[lane])
                    apart = w[col, lane] - grid[col, lane] * scale[lane]
                    # a grid point beyond float32's range cannot be made up for
                    error[lane] = apart if abs(apart) < np.inf else 0
                for i in range(j + 1, count):
                    share, into = within[start + i, j], moved[i]
                    for lane in range(LANES):
                        into[lane] += share * error[lane]
            _add_product(inputs[:, start : start + count], errors[:count], r)
        _store(grid, first, is_fp4, out)


@part
def _load(values: Floats, scales: Floats, first: int, b: int, w: Floats, steps: Floats) -> None:
    """Rows from ``first`` on, transposed; zeros of scale 1 where there are none."""
    for lane in range(LANES):
        row = first + lane
        if row < values.shape[0]:
            for col in range(values.shape[1]):
                w[col, lane] = values[row, col]
            for block in range(scales.shape[1]):
                steps[block, lane] = scales[row // b, block]
        else:
            w[:, lane] = 0
            steps[:, lane] = 1


@part
def _store(grid: Floats, first: int, is_fp4: bool, out: Bytes) -> None:
    """The codes of grid points. FP8's are exponent and upper mantissa of a float32, below 2**-6 a
    multiple of 2**-9."""
    for row in range(first, min(first + LANES, out.shape[0])):
        for col in range(out.shape[1]):
            value = grid[col, row - first]
            size = abs(value)
            if is_fp4:
                code = I64(size * 2) if size <= 2 else (I64(size) + 2 if size <= 4 else 7)
                out[row, col] = code | 8 if value < 0 else code
            else:
                bits = I64(np.float32(size).view(np.uint32))
                code = (bits >> 20) - (120 << 3) if size >= 2.0**-6 else I64(size * 512)
                out[row, col] = code | 0x80 if np.signbit(value) else code


@part
def _add_product(a: Floats, b: Floats, out: Floats) -> None:
    """``out[:] += a @ b``, LANES columns; eight rows of b at a time so that out is seldom read."""
    rows, inner = a.shape
    for row in range(rows):
        into = out[row]
        k = 0
        while k + 8 <= inner:
            a0, a1, a2, a3 = a[row, k], a[row, k + 1], a[row, k + 2], a[row, k + 3]
            a4, a5, a6, a7 = a[row, k + 4], a[row, k + 5], a[row, k + 6], a[row, k + 7]
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            b4, b5, b6, b7 = b[k + 4], b[k + 5], b[k + 6], b[k + 7]
            for lane in range(LANES):
                one = (a0 * b0[lane] + a1 * b1[lane]) + (a2 * b2[lane] + a3 * b3[lane])
                other = (a4 * b4[lane] + a5 * b5[lane]) + (a6 * b6[lane] + a7 * b7[lane])
                into[lane] += one + other
            k += 8
        while k < inner:
            one, line = a[row, k], b[k]
            for lane in range(LANES):
                into[lane] += one * line[lane]
            k += 1


@part
def _to_grid_fp4(sizes: Floats) -> None:
    """The grid's steps are 1/2 up to 2, 1 up to 4 and 2 up to 6; rint's ties are the even codes."""
    for lane in range(LANES):
        size = min(sizes[lane], np.float32(e2m1.MAX))
        step = np.float32(0.5) if size < 2 else (np.float32(1) if size < 4 else np.float32(2))
        sizes[lane] = np.rint(size / step) * step


@part
def _to_grid_fp8(sizes: Floats) -> None:
    """The grid's steps are an eighth of the power of two below a value, and 2**-9 below 2**-6."""
    powers = np.empty(LANES, np.float32)
    bits, exponents = sizes.view(np.uint32), powers.view(np.uint32)
    for lane in range(LANES):
        exponents[lane] = bits[lane] & 0x7F800000
    for lane in range(LANES):
        size = min(sizes[lane], np.float32(e4m3.MAX))
        step = max(min(powers[lane], np.float32(256)), np.float32(2.0**-6)) * np.float32(0.125)
        sizes[lane] = np.rint(size / step) * step
