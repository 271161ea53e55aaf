"""What quantise_fp4 and quantise_fp8 share: blocks of weights to codes under a scale rule.

The CPU twin of quantise_blocks_torch, bit for bit: codes, scales and figures.

A *chunk* is some blocks of one row of blocks: 64 FP4 groups of 32, or one block of any other kind.
Each block, row-major and filled up with zeros to a power of two of values, is cut into 8 equal
*lanes* of p values. A chunk holds ``[8, G * p]``: the first lanes of its G blocks, side by side,
then all the second ones, and so on. So lanes k and k + 4 are halves of every block at once, which
is what the sums fold; and all loops are long and straight, which is what LLVM vectorises.

The arithmetic is float32 and integers, exact for every scale byte and every finite value; squares
and their sums are float64.

Dimensions: R rows, C columns, blocks of b x c, h x w of them; m = G * p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.rules import (
    FP8_LOSING,
    MARGIN,
    ZERO_EXPONENTS,
    Element,
    ScaleRule,
    candidates,
)
from dsv4_quant.kernels.figures import EXACT, FLUSHED, SATURATED, Figures
from dsv4_quant.kernels.jit_numba import I64, NAN, ceil_div, expect, inline, kernel, part

U32, F32, F64 = np.uint32, np.float32, np.float64
Bytes = NDArray[np.uint8]
Bits = NDArray[Any]  # BF16 as uint16, float32 as uint32
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_LANES = 8
_GROUP = 32
"""Values of the groups that are worked on together; 4 of them in a lane."""
_TOGETHER = 128

_ZERO, _ONE = U32(0), U32(1)
_MAGNITUDE, _EXPONENT = U32(0x7FFFFFFF), U32(0x7F800000)
_MANTISSA, _MANTISSA_BITS = 0x7FFFFF, 23
_HALF_MANTISSA = 0x400000


class Grid(NamedTuple):
    """An element's code values, as the kernel needs them."""

    drop: np.uint32
    """How many bits of a float32's mantissa a code does not have."""
    smallest: np.uint32
    """Bits of the smallest normal code value: the steps below it are those above it."""
    top: np.float32
    top_code: np.uint32
    carry: int
    """Added to the bits of an amax, it carries into the exponent if s_max is one more."""
    above: int
    """By how much the exponent field of that sum is above the scale byte."""
    sign: np.uint32
    zero_sign: bool
    """Whether zero has a sign."""
    zero_scale: int
    """Scale byte of a block of zeros."""
    losing: np.float32
    """A block with such a value, in units of 2**s_max, keeps s_max."""


def _grid(element: Element, mantissa: int, values: Floats, losing: float) -> Grid:
    top_bits = int(values[-1].view(U32))
    return Grid(
        drop=U32(_MANTISSA_BITS - mantissa),
        smallest=values[1 << mantissa].view(U32),
        top=values[-1],
        top_code=U32(values.size - 1),
        carry=_MANTISSA - (top_bits & _MANTISSA),
        above=(top_bits >> _MANTISSA_BITS) - e8m0.BIAS,
        sign=U32(0x80 if element == "fp8" else 8),
        zero_sign=element == "fp8",
        zero_scale=ZERO_EXPONENTS[element] + e8m0.BIAS,
        losing=F32(losing),
    )


GRIDS = {
    "fp4": _grid("fp4", 1, e2m1.VALUES[:8], np.inf),
    "fp8": _grid("fp8", 3, e4m3.VALUES[: e4m3.NAN_CODES[0]], FP8_LOSING),
}


def quantise_blocks(
    values: NDArray[Any],
    element: Element,
    rule: ScaleRule | None,
    block: tuple[int, int],
    scales: Bytes,
    codes: Bytes | None,
    figures: Figures | None,
    result: Ints,
) -> int:
    """One panel; arguments and status as those of quantise_fp4 and quantise_fp8."""
    bits, shift = float_bits(values)
    (rows, cols), (b, c) = bits.shape, block
    if min(block) < 1:
        raise ValueError(f"a block holds at least one value, not {b} x {c}")
    h, w = ceil_div(rows, b), ceil_div(cols, c)
    expect("scales", scales, np.uint8, (h, w))
    expect("result", result, np.int64, (3,))
    if codes is None:
        codes = np.empty((0, 0), np.uint8)
    else:
        expect("codes", codes, np.uint8, (rows, cols // 2 if element == "fp4" else cols))
    if figures is None:
        figures = Figures.empty(0)
    else:
        figures.begin(h, values=rows * cols, blocks=h * w)
    together = element == "fp4" and block == (1, _GROUP) and cols % _GROUP == 0
    size = max(_GROUP, 1 << (b * c - 1).bit_length())
    return _quantise(
        bits,
        bits.view(np.uint64) if together else np.empty((0, 0), np.uint64),
        shift,
        GRIDS[element],
        (b, c, size // _LANES),
        candidates(rule, element, b * c) if rule else 0,
        MARGIN,
        e8m0.VALUES,
        scales,
        codes,
        codes.view(np.uint16) if together else np.empty((0, 0), np.uint16),
        figures.value_squares,
        figures.error_squares,
        figures.largest_error,
        figures.counts,
        figures.scales,
        result,
    )


def float_bits(values: NDArray[Any]) -> tuple[Bits, np.uint32]:
    """The bits of a panel of BF16 or float32, and how far left they stand in those of a float32."""
    if values.dtype == np.uint16:
        expect("values", values, np.uint16, values.shape)
        return values, U32(16)
    expect("values", values, np.float32, values.shape)
    return values.view(np.uint32), U32(0)


class Chunk(NamedTuple):
    """Scratch memory for one chunk."""

    values: Bits
    """``[8, m]``"""
    words: Words
    """The same memory, 8 bytes to an element."""
    codes: Bytes
    """``[8, m]``, one to a byte."""
    errors: Floats
    """``[8, m]`` \\|v\\| - code * S."""
    inverses: Floats
    """``[m]`` 1 / S of the block."""
    halves: Floats
    """``[m]`` S / 2 of the block."""
    peaks: NDArray[np.uint32]
    """``[m]`` bits of the largest magnitudes; in the end ``[G]``."""
    lanes: Doubles
    """``[m]`` squares, their first 8 lanes added up."""
    sums: Doubles
    """``[G]`` sums of squares."""
    best: Doubles
    """``[G]`` the least sums so far."""


@kernel
def _quantise(
    bits: Bits,
    words: Words,
    shift: np.uint32,
    grid: Grid,
    shape: tuple[int, int, int],
    tries: int,
    margin: float,
    scale_values: Floats,
    scales: Bytes,
    codes: Bytes,
    codes4: NDArray[np.uint16],
    value_squares: Doubles,
    error_squares: Doubles,
    largest_error: Floats,
    counts: Ints,
    histogram: Ints,
    result: Ints,
) -> int:
    """``words`` (8 bytes of values) and ``codes4`` (4 codes) are empty unless groups are worked on
    together; ``codes`` and the figures, unless they are wanted. ``tries`` is how many scales are
    tried, 0 where they are given."""
    b, c, p = shape
    w, together = scales.shape[1], _TOGETHER if words.size else 1
    flat_scales, sources, targets = scales.reshape(-1), words.reshape(-1), codes4.reshape(-1)
    chunk = _new_chunk(bits, together, p)
    for first in range(0, scales.size, together):
        chosen = flat_scales[first : first + together]
        row, col, used = first // w * b, first % w * c, chosen.size * p
        if words.size:
            _take_groups(sources, first, chosen.size, chunk)
        else:
            _take_block(bits, row, col, b, c, chunk)
        if tries:
            if not _largest_scales(chunk, shift, p, grid, chosen):
                _find_infinite(bits, shift, row, result)
                return NAN
            if tries > 1 and _can_gain(chunk, grid, scale_values, chosen):
                _least_squares(chunk, shift, p, grid, tries, margin, scale_values, chosen)
        if not codes.size and not value_squares.size:
            continue
        _spread(chosen, 0, p, scale_values, chunk)
        saturated, flushed, largest = _round(chunk, shift, used, grid)
        if codes4.size:
            _give_groups(chunk, first, chosen.size, targets)
        elif codes.size:
            if codes.shape[1] == bits.shape[1]:
                _give_block(chunk, row, col, b, c, codes)
            else:
                _give_packed(chunk, row, col, c, codes)
        if value_squares.size:
            counts[SATURATED] += saturated
            counts[FLUSHED] += flushed
            largest_error[0] = max(largest_error[0], largest)
            sums = chunk.sums[: chosen.size]
            _fold(chunk.values, shift, p, chunk.lanes, sums)
            _add_up(sums, first, w, value_squares)
            _fold(chunk.errors.view(np.uint32), _ZERO, p, chunk.lanes, sums)
            _add_up(sums, first, w, error_squares)
            for j in range(chosen.size):
                counts[EXACT] += sums[j] == 0
                histogram[chosen[j]] += 1
    return 0


@inline
def _new_chunk(bits: Bits, together: int, p: int) -> Chunk:
    """Values are zeros: what no block ever fills stays so."""
    m = together * p
    values = np.zeros((_LANES, m), bits.dtype)
    return Chunk(
        values,
        values.view(np.uint64),
        np.empty((_LANES, m), np.uint8),
        np.empty((_LANES, m), np.float32),
        np.empty(m, np.float32),
        np.empty(m, np.float32),
        np.empty(m, np.uint32),
        np.empty(m, np.float64),
        np.empty(together, np.float64),
        np.empty(together, np.float64),
    )


@inline
def _take_groups(words: Words, first: int, groups: int, chunk: Chunk) -> None:
    """Groups of a row: a lane of 4 values is a word of BF16, or two of float32."""
    lanes = chunk.words.reshape(_LANES, _TOGETHER, -1)
    source = words.reshape(-1, _LANES, lanes.shape[2])[first : first + groups]
    for lane in range(_LANES):
        for k in range(lanes.shape[2]):
            for j in range(source.shape[0]):
                lanes[lane, j, k] = source[j, lane, k]


@inline
def _take_block(bits: Bits, row: int, col: int, b: int, c: int, chunk: Chunk) -> None:
    """One block, zeros beyond the edges."""
    source = bits[row : row + b, col : col + c]
    block = chunk.values.reshape(-1)[: b * c].reshape(b, c)
    if source.size < block.size:
        block[:] = 0
    for i in range(source.shape[0]):
        for k in range(source.shape[1]):
            block[i, k] = source[i, k]


@inline
def _largest_scales(chunk: Chunk, shift: np.uint32, p: int, grid: Grid, scales: Bytes) -> bool:
    """s_max of every block; False if there is an infinity or a NaN.

    amax <= top * 2**s where amax's exponent is no more than top's and s, with no larger a mantissa;
    else s is one more.
    """
    values, peaks = chunk.values, chunk.peaks
    used = scales.size * p
    for i in range(used):
        peaks[i] = 0
    for lane in range(_LANES):
        for i in range(used):
            bits = U32(values[lane, i]) << (shift & U32(31))
            peaks[i] = _larger(peaks[i], U32(bits & _MAGNITUDE))
    n = p
    while n > 4:
        n //= 2
        for i in range(n):
            peaks[i] = _larger(peaks[i], peaks[i + n])
    fours, most = peaks.reshape(-1, 4), _ZERO
    for j in range(scales.size):
        amax = _larger(_larger(fours[j, 0], fours[j, 1]), _larger(fours[j, 2], fours[j, 3]))
        peaks[j] = amax
        most = _larger(most, amax)
        s = ((I64(amax) + grid.carry) >> _MANTISSA_BITS) - grid.above
        scales[j] = max(s, 0) if amax else grid.zero_scale
    return most < _EXPONENT


@inline
def _can_gain(chunk: Chunk, grid: Grid, scale_values: Floats, scales: Bytes) -> bool:
    """Whether some block may have less error under a smaller scale."""
    gaining = False
    for j in range(scales.size):
        inverse = scale_values[254 - scales[j]]
        gaining |= _as_float(chunk.peaks[j]) * inverse < grid.losing
    return gaining


@inline
def _least_squares(
    chunk: Chunk,
    shift: np.uint32,
    p: int,
    grid: Grid,
    tries: int,
    margin: float,
    scale_values: Floats,
    scales: Bytes,
) -> None:
    """From s_max the best of the scales below it."""
    errors = chunk.errors.view(np.uint32)
    largest, sums = scales.copy(), chunk.sums[: scales.size]
    for step in range(tries):
        _spread(largest, step, p, scale_values, chunk)
        _errors(chunk, shift, scales.size * p, grid)
        _fold(errors, _ZERO, p, chunk.lanes, sums)
        for j in range(scales.size):
            if step == 0 or sums[j] < chunk.best[j] * margin:
                chunk.best[j] = sums[j]
                scales[j] = max(I64(largest[j]) - step, 0)


@inline
def _spread(scales: Bytes, step: int, p: int, scale_values: Floats, chunk: Chunk) -> None:
    """Scales that are ``step`` smaller to where the loops over values want them."""
    inverses, halves = chunk.inverses.reshape(-1, 4), chunk.halves.reshape(-1, 4)
    for i in range(scales.size * p // 4):
        scale = max(I64(scales[min(i, scales.size - 1)]) - step, 0)
        inverse, half = scale_values[254 - scale], scale_values[scale] * F32(0.5)
        inverses[i, 0], inverses[i, 1], inverses[i, 2], inverses[i, 3] = inverse, inverse, inverse, inverse
        halves[i, 0], halves[i, 1], halves[i, 2], halves[i, 3] = half, half, half, half


@inline
def _larger(a: np.uint32, b: np.uint32) -> np.uint32:
    return U32(a) if a > b else U32(b)


@inline
def _as_float(bits: int) -> np.float32:
    return U32(bits).view(np.float32)


@inline
def _as_bits(value: np.float32) -> np.uint32:
    return F32(value).view(np.uint32)


@inline
def _nearest(scaled: np.float32, grid: Grid) -> tuple[np.float32, np.uint32]:
    """The grid point nearest to v / S, ties to even, and its code.

    Grid points of the binade from 2**e on are 2**(e - mantissa) apart, and below the smallest
    normal one no closer. Beside ``large = 1.5 * 2**(e - mantissa + 23)`` so are float32 numbers:
    adding it rounds, and taking it off is exact. The sum's bits count the steps from large on; and
    codes of one binade begin where those of the binade below end.
    """
    binade = U32(_as_bits(scaled) & _EXPONENT)
    binade = binade if binade > grid.smallest else grid.smallest
    large = U32(binade + (grid.drop << U32(_MANTISSA_BITS)) + U32(_HALF_MANTISSA))
    total = scaled + _as_float(large)
    nearest = total - _as_float(large)
    steps = U32(_as_bits(total) - large)
    code = U32(steps + U32(U32(binade - grid.smallest) >> (grid.drop & U32(31))))
    return (
        nearest if nearest < grid.top else grid.top,
        code if code < grid.top_code else grid.top_code,
    )


@inline
def _error(magnitude: np.float32, nearest: np.float32, half: np.float32) -> np.float32:
    """Exact: both differences are multiples of the magnitude's last bit and no larger than it; and
    half of ``nearest * S``, unlike the whole, is always in range."""
    product = nearest * half
    return magnitude - product - product


@inline
def _errors(chunk: Chunk, shift: np.uint32, used: int, grid: Grid) -> None:
    values, inverses, halves, errors = chunk.values, chunk.inverses, chunk.halves, chunk.errors
    for lane in range(_LANES):
        for i in range(used):
            magnitude = _as_float((U32(values[lane, i]) << (shift & U32(31))) & _MAGNITUDE)
            nearest, _ = _nearest(magnitude * inverses[i], grid)
            errors[lane, i] = _error(magnitude, nearest, halves[i])


@inline
def _round(
    chunk: Chunk, shift: np.uint32, used: int, grid: Grid
) -> tuple[np.uint32, np.uint32, np.float32]:
    """Codes and errors; how many saturated, how many were flushed, and the largest error."""
    values, inverses, halves = chunk.values, chunk.inverses, chunk.halves
    codes, errors = chunk.codes, chunk.errors
    saturated, flushed, largest = _ZERO, _ZERO, _ZERO
    for lane in range(_LANES):
        for i in range(used):
            bits = U32(U32(values[lane, i]) << (shift & U32(31)))
            magnitude = _as_float(bits & _MAGNITUDE)
            scaled = magnitude * inverses[i]
            nearest, code = _nearest(scaled, grid)
            signed = (bits > _MAGNITUDE) & ((code > 0) | grid.zero_sign)
            codes[lane, i] = U32(code + (grid.sign if signed else _ZERO))
            error = _error(magnitude, nearest, halves[i])
            errors[lane, i] = error
            saturated = U32(saturated + (_ONE if scaled > grid.top else _ZERO))
            flushed = U32(flushed + (_ONE if (code == 0) & (magnitude > 0) else _ZERO))
            error_bits = U32(_as_bits(error) & _MAGNITUDE)
            largest = error_bits if error_bits > largest else largest
    return saturated, flushed, _as_float(largest)


@inline
def _fold(bits: Bits, shift: np.uint32, p: int, lanes: Doubles, sums: Doubles) -> None:
    """The sum of the squares of every block, by halves: first 8 lanes, then the p values."""
    for i in range(sums.size * p):
        even = (_square(bits[0, i], shift) + _square(bits[4, i], shift)) + (
            _square(bits[2, i], shift) + _square(bits[6, i], shift)
        )
        odd = (_square(bits[1, i], shift) + _square(bits[5, i], shift)) + (
            _square(bits[3, i], shift) + _square(bits[7, i], shift)
        )
        lanes[i] = even + odd
    n = p
    while n > 4:
        n //= 2
        for i in range(n):
            lanes[i] += lanes[i + n]
    fours = lanes.reshape(-1, 4)
    for j in range(sums.size):
        sums[j] = (fours[j, 0] + fours[j, 2]) + (fours[j, 1] + fours[j, 3])


@inline
def _add_up(sums: Doubles, first: int, w: int, rows: Doubles) -> None:
    """Sums of blocks, the first of which is the panel's ``first``, onto those of their rows."""
    row, left = first // w, w - first % w
    total = rows[row]
    for j in range(sums.size):
        if left == 0:
            rows[row] = total
            row, left, total = row + 1, w, 0.0
        total += sums[j]
        left -= 1
    rows[row] = total


@inline
def _square(bits: int, shift: np.uint32) -> np.float64:
    value = F64(_as_float(U32(bits) << (shift & U32(31))))
    return value * value


@inline
def _give_groups(chunk: Chunk, first: int, groups: int, codes4: NDArray[np.uint16]) -> None:
    """The codes of groups of a row; four to a word, as in their lanes."""
    fours = chunk.codes.view(np.uint32)
    out = codes4.reshape(-1, _LANES)[first : first + groups]
    for lane in range(_LANES):
        for j in range(out.shape[0]):
            four = U32(fours[lane, j])
            four = U32(four | (four >> U32(4)))
            out[j, lane] = (four & U32(0xFF)) | ((four >> U32(8)) & U32(0xFF00))


@inline
def _give_block(chunk: Chunk, row: int, col: int, b: int, c: int, codes: Bytes) -> None:
    """The codes of an FP8 block."""
    block = chunk.codes.reshape(-1)[: b * c].reshape(b, c)
    out = codes[row : row + b, col : col + c]
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = block[i, k]


@inline
def _give_packed(chunk: Chunk, row: int, col: int, c: int, codes: Bytes) -> None:
    """The codes of one FP4 group, two to a byte."""
    flat = chunk.codes.reshape(-1)
    out = codes[row, col // 2 :]
    for k in range(min(c // 2, out.size)):
        out[k] = flat[2 * k] | (flat[2 * k + 1] << 4)


@inline
def _find_infinite(bits: Bits, shift: np.uint32, row: int, result: Ints) -> None:
    """The first infinity or NaN from a row on; there is one."""
    col = 0
    while U32(U32(bits[row, col]) << (shift & U32(31))) & _EXPONENT < _EXPONENT:
        col += 1
        if col == bits.shape[1]:
            row, col = row + 1, 0
    result[0], result[1], result[2] = row, col, bits[row, col]
