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
from dsv4_quant.kernels.jit_numba import I64, NAN, U64, ceil_div, expect, inline, kernel

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
_SLICE = 512
"""Values of a lane that are rounded at a time: their errors fit the L1 cache, 8 times."""

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
    status = _quantise(
        bits,
        _in_words(bits) if together else _in_words(bits[:0]),
        shift,
        GRIDS[element],
        _new_chunk(bits.dtype, _TOGETHER if together else 1, b, c),
        block,
        candidates(rule, element, b * c) if rule else 0,
        MARGIN,
        e8m0.VALUES,
        scales,
        codes,
        _in_words(codes) if together else _in_words(codes[:0]),
        figures.value_squares,
        figures.error_squares,
        figures.largest_error,
        figures.counts,
        figures.scales,
    )
    if status:
        _name_first(bits, shift, result)
    return status


def float_bits(values: NDArray[Any]) -> tuple[Bits, np.uint32]:
    """The bits of a panel of BF16 or float32, and how far left they stand in those of a float32."""
    if values.dtype == np.uint16:
        expect("values", values, np.uint16, values.shape)
        return values, U32(16)
    expect("values", values, np.float32, values.shape)
    return values.view(np.uint32), U32(0)


def _name_first(bits: Bits, shift: np.uint32, result: Ints) -> None:
    """The place of the first infinity or NaN of a panel that has one."""
    refused = (bits.astype(np.uint32) << shift) & _EXPONENT == _EXPONENT
    row, col = np.unravel_index(refused.argmax(), bits.shape)
    result[:] = row, col, bits[row, col]


def _in_words(array: NDArray[Any]) -> Words:
    return array.reshape(-1).view(np.uint64)


class Chunk(NamedTuple):
    """Scratch memory for one chunk, and other views of it.

    A lane of a large block is worked on in S slices of n values; elsewhere S is 1.
    """

    values: Bits
    """``[8, S, n]``"""
    words: Words
    """The values ``[8, m / 4, 1 or 2]``, 8 bytes to an element."""
    block: Bits
    """The values ``[b, c]``, if there is one block only."""
    codes: Bytes
    """``[8, S, n]``, one to a byte."""
    codes4: NDArray[np.uint32]
    """The codes ``[8, m / 4]``, four to an element."""
    block_codes: Bytes
    """The codes ``[b, c]``, if there is one block only."""
    magnitudes: Floats
    """``[8, n]`` |v| of a slice."""
    errors: Floats
    """``[8, n]`` |v| - code * S of a slice."""
    scales: Floats
    """``[2, n]`` 1 / S and S / 2 of the block."""
    scales4: Floats
    """The same ``[2, n / 4, 4]``."""
    peaks: NDArray[np.uint32]
    """``[m]`` bits of the largest magnitudes."""
    peaks4: NDArray[np.uint32]
    """The same ``[m / 4, 4]``."""
    lanes: Doubles
    """``[S, n]`` squared errors, their 8 lanes added up."""
    value_lanes: Doubles
    """``[S, n]`` the same of values."""
    sums: Doubles
    """``[G]`` squares of whole blocks added up."""
    best: Doubles
    """``[G]`` the least of these."""


def _new_chunk(dtype: np.dtype[Any], together: int, b: int, c: int) -> Chunk:
    """Values are zeros: what no block ever fills stays so."""
    p = max(_GROUP, 1 << (b * c - 1).bit_length()) // _LANES
    m = together * p
    n = min(m, _SLICE)
    values, codes = np.zeros((_LANES, m), dtype), np.zeros((_LANES, m), np.uint8)
    whole = slice(b * c if together == 1 else 0)
    scales, peaks = np.empty((2, n), np.float32), np.empty(m, np.uint32)
    return Chunk(
        values=values.reshape(_LANES, -1, n),
        words=values.view(np.uint64).reshape(_LANES, m // 4, -1),
        block=values.reshape(-1)[whole].reshape(-1, c),
        codes=codes.reshape(_LANES, -1, n),
        codes4=codes.view(np.uint32),
        block_codes=codes.reshape(-1)[whole].reshape(-1, c),
        magnitudes=np.empty((_LANES, n), np.float32),
        errors=np.empty((_LANES, n), np.float32),
        scales=scales,
        scales4=scales.reshape(2, -1, 4),
        peaks=peaks,
        peaks4=peaks.reshape(-1, 4),
        lanes=np.empty((m // n, n)),
        value_lanes=np.empty((m // n, n)),
        sums=np.empty(together),
        best=np.empty(together),
    )


@kernel
def _quantise(
    bits: Bits,
    words: Words,
    shift: np.uint32,
    grid: Grid,
    chunk: Chunk,
    block: tuple[int, int],
    tries: int,
    margin: float,
    scale_values: Floats,
    scales: Bytes,
    codes: Bytes,
    codes16: Words,
    value_squares: Doubles,
    error_squares: Doubles,
    largest_error: Floats,
    counts: Ints,
    histogram: Ints,
) -> int:
    """``words`` and ``codes16`` are all values and codes in a row, 8 bytes to an element; empty
    unless groups are worked on together. ``codes`` and the figures are empty unless they are
    wanted. ``tries`` is how many scales are tried, 0 where they are given."""
    (b, c), w, together = block, scales.shape[1], chunk.sums.size
    p, flat_scales = chunk.peaks.size // together, scales.reshape(-1)
    for first in range(0, scales.size, together):
        chosen = flat_scales[first : first + together]
        row, col = first // w * b, first % w * c
        if words.size:
            per_group = words.size // scales.size
            _take_groups(words[first * per_group : (first + together) * per_group], chunk)
        else:
            _take_block(bits, row, col, chunk)
        if tries:
            if not _largest_scales(chunk, shift, p, grid, chosen):
                return NAN
            if tries > 1 and _can_gain(chunk, grid, scale_values, chosen):
                _least_squares(chunk, shift, p, grid, tries, margin, scale_values, chosen)
        if not codes.size and not value_squares.size:
            continue
        used = _spread(chosen, 0, p, scale_values, chunk)
        for at in range(chunk.values.shape[1]):
            saturated, flushed, largest = _round(chunk, shift, at, used, grid)
            if value_squares.size:
                counts[SATURATED] += saturated
                counts[FLUSHED] += flushed
                largest_error[0] = max(largest_error[0], largest)
                _fold_lanes(chunk.errors, used, chunk.lanes[at])
                _fold_lanes(chunk.magnitudes, used, chunk.value_lanes[at])
        if codes16.size:
            _give_groups(chunk, codes16[2 * first : 2 * (first + together)])
        elif codes.shape[1] == bits.shape[1]:
            _give_block(chunk, row, col, codes)
        elif codes.size:
            _give_packed(chunk, codes[row, col // 2 : (col + c) // 2])
        if value_squares.size:
            sums = chunk.sums[: chosen.size]
            _fold(chunk.value_lanes, p, sums)
            _add_up(sums, first, w, value_squares)
            _fold(chunk.lanes, p, sums)
            _add_up(sums, first, w, error_squares)
            for j in range(chosen.size):
                counts[EXACT] += sums[j] == 0
                histogram[chosen[j]] += 1
    return 0


@inline
def _take_groups(words: Words, chunk: Chunk) -> None:
    """Groups: a lane of 4 values is one word of BF16, or two of float32."""
    lanes = chunk.words
    each = lanes.shape[2]
    for lane in range(_LANES):
        for k in range(each):
            for j in range(words.size // (_LANES * each)):
                lanes[lane, j, k] = words[(j * _LANES + lane) * each + k]


@inline
def _take_block(bits: Bits, row: int, col: int, chunk: Chunk) -> None:
    """One block, zeros beyond the edges."""
    block = chunk.block
    rows = min(block.shape[0], bits.shape[0] - row)
    if rows < block.shape[0] or col + block.shape[1] > bits.shape[1]:
        block[:] = 0
    for i in range(rows):
        source = bits[row + i, col : col + block.shape[1]]
        for k in range(source.size):
            block[i, k] = source[k]


@inline
def _largest_scales(chunk: Chunk, shift: np.uint32, p: int, grid: Grid, scales: Bytes) -> bool:
    """s_max of every block; False if there is an infinity or a NaN.

    amax <= top * 2**s where amax's exponent is no more than top's and s, with no larger a mantissa;
    else s is one more.
    """
    values, peaks, fours = chunk.values, chunk.peaks, chunk.peaks4
    used, n = scales.size * p, values.shape[2]
    for i in range(used):
        peaks[i] = 0
    for lane in range(_LANES):
        for at in range(values.shape[1]):
            here = peaks[at * n : min((at + 1) * n, used)]
            for i in range(here.size):
                here[i] = _larger(here[i], _magnitude(values[lane, at, i], shift))
    while p > 4:
        p //= 2
        for i in range(p):
            peaks[i] = _larger(peaks[i], peaks[i + p])
    most = _ZERO
    for j in range(scales.size):
        amax = _larger(_larger(fours[j, 0], fours[j, 1]), _larger(fours[j, 2], fours[j, 3]))
        peaks[j] = amax
        most = _larger(most, amax)
        s = ((I64(amax) + grid.carry) >> _MANTISSA_BITS) - grid.above
        scales[j] = max(s, 0) if amax else grid.zero_scale
    return bool(most < _EXPONENT)


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
    """From s_max to the best of the scales below it."""
    largest, sums, best = scales.copy(), chunk.sums[: scales.size], chunk.best
    for step in range(tries):
        used = _spread(largest, step, p, scale_values, chunk)
        for at in range(chunk.values.shape[1]):
            _errors(chunk, shift, at, used, grid)
            _fold_lanes(chunk.errors, used, chunk.lanes[at])
        _fold(chunk.lanes, p, sums)
        for j in range(sums.size):
            if step == 0 or sums[j] < best[j] * margin:
                best[j] = sums[j]
                scales[j] = max(I64(largest[j]) - step, 0)


@inline
def _spread(scales: Bytes, step: int, p: int, scale_values: Floats, chunk: Chunk) -> int:
    """Scales that are ``step`` smaller, to where the loops over values want them; returns how many
    values of each lane and slice are used."""
    fours, used = chunk.scales4, min(scales.size * p, _SLICE)
    for i in range(used // 4):
        scale = max(I64(scales[min(i, scales.size - 1)]) - step, 0)
        inverse, half = scale_values[254 - scale], scale_values[scale] * F32(0.5)
        fours[0, i, 0], fours[0, i, 1], fours[0, i, 2], fours[0, i, 3] = (
            inverse, inverse, inverse, inverse,
        )  # fmt: skip
        fours[1, i, 0], fours[1, i, 1], fours[1, i, 2], fours[1, i, 3] = half, half, half, half
    return used


@inline
def _larger(a: np.uint32, b: np.uint32) -> np.uint32:
    return U32(a) if a > b else U32(b)


@inline
def _as_float(bits: np.unsignedinteger[Any]) -> np.float32:
    return U32(bits).view(np.float32)


@inline
def _as_bits(value: np.float32) -> np.uint32:
    return F32(value).view(np.uint32)


@inline
def _widen(bits: int, shift: np.uint32) -> np.uint32:
    """The bits as those of a float32. (LLVM must see that no more than 31 are shifted.)"""
    return U32(U32(bits) << (shift & U32(31)))


@inline
def _magnitude(bits: int, shift: np.uint32) -> np.uint32:
    return U32(_widen(bits, shift) & _MAGNITUDE)


@inline
def _nearest(scaled: np.float32, grid: Grid) -> tuple[np.float32, np.uint32]:
    """The grid point nearest to v / S, ties to even, and its code.

    Grid points of the binade from 2**e on are 2**(e - mantissa) apart, and below the smallest
    normal one no closer. Beside ``large = 1.5 * 2**(e - mantissa + 23)`` so are float32 numbers:
    adding it rounds, and taking it off is exact. The sum's bits count the steps from large on; and
    codes of one binade begin where those of the binade below end.
    """
    binade = _larger(_as_bits(scaled) & _EXPONENT, grid.smallest)
    large = U32(binade + (grid.drop << _MANTISSA_BITS) + _HALF_MANTISSA)
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
def _errors(chunk: Chunk, shift: np.uint32, at: int, used: int, grid: Grid) -> None:
    """Of one slice under the scales that are spread."""
    values, scales, errors = chunk.values, chunk.scales, chunk.errors
    for lane in range(_LANES):
        for i in range(used):
            magnitude = _as_float(_magnitude(values[lane, at, i], shift))
            nearest, _ = _nearest(magnitude * scales[0, i], grid)
            errors[lane, i] = _error(magnitude, nearest, scales[1, i])


@inline
def _round(
    chunk: Chunk, shift: np.uint32, at: int, used: int, grid: Grid
) -> tuple[np.uint32, np.uint32, np.float32]:
    """The same and codes; how many saturated, how many were flushed, and the largest error."""
    values, scales, codes, errors = chunk.values, chunk.scales, chunk.codes, chunk.errors
    magnitudes = chunk.magnitudes
    saturated, flushed, largest = _ZERO, _ZERO, _ZERO
    for lane in range(_LANES):
        for i in range(used):
            bits = _widen(values[lane, at, i], shift)
            magnitude = _as_float(bits & _MAGNITUDE)
            scaled = magnitude * scales[0, i]
            nearest, code = _nearest(scaled, grid)
            signed = (bits > _MAGNITUDE) & ((code > 0) | grid.zero_sign)
            codes[lane, at, i] = U32(code + (grid.sign if signed else _ZERO))
            error = _error(magnitude, nearest, scales[1, i])
            magnitudes[lane, i] = magnitude
            errors[lane, i] = error
            saturated = U32(saturated + (_ONE if scaled > grid.top else _ZERO))
            flushed = U32(flushed + (_ONE if (code == 0) & (magnitude > 0) else _ZERO))
            largest = _larger(largest, U32(_as_bits(error) & _MAGNITUDE))
    return saturated, flushed, _as_float(largest)


@inline
def _square(value: np.float32) -> np.float64:
    return F64(value) * F64(value)


@inline
def _fold_lanes(x: Floats, used: int, lanes: Doubles) -> None:
    """The squares of a slice, the first three of the folds by halves."""
    for i in range(used):
        even = (_square(x[0, i]) + _square(x[4, i])) + (_square(x[2, i]) + _square(x[6, i]))
        odd = (_square(x[1, i]) + _square(x[5, i])) + (_square(x[3, i]) + _square(x[7, i]))
        lanes[i] = even + odd


@inline
def _fold(slices: Doubles, p: int, sums: Doubles) -> None:
    """The other folds. Several blocks have p = 4."""
    lanes = slices.reshape(-1)
    while p > 4:
        p //= 2
        for i in range(p):
            lanes[i] += lanes[i + p]
    fours = lanes.reshape(lanes.size // 4, 4)
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
def _give_groups(chunk: Chunk, out: Words) -> None:
    """The codes of groups, 16 to an element."""
    fours = chunk.codes4
    for j in range(out.size // 2):
        low = _pack(fours[0, j], fours[1, j]) | _pack(fours[2, j], fours[3, j]) << U64(32)
        high = _pack(fours[4, j], fours[5, j]) | _pack(fours[6, j], fours[7, j]) << U64(32)
        out[2 * j], out[2 * j + 1] = low, high


@inline
def _pack(low: np.uint32, high: np.uint32) -> np.uint64:
    """Eight codes, one to a byte, to two to a byte."""
    x = U64(low) | U64(high) << U64(32)
    x = (x | x >> U64(4)) & U64(0x00FF00FF00FF00FF)
    x = (x | x >> U64(8)) & U64(0x0000FFFF0000FFFF)
    return (x | x >> U64(16)) & U64(0xFFFFFFFF)


@inline
def _give_block(chunk: Chunk, row: int, col: int, codes: Bytes) -> None:
    """The codes of one FP8 block."""
    block = chunk.block_codes
    for i in range(min(block.shape[0], codes.shape[0] - row)):
        out = codes[row + i, col : col + block.shape[1]]
        for k in range(out.size):
            out[k] = block[i, k]


@inline
def _give_packed(chunk: Chunk, out: Bytes) -> None:
    """The codes of one FP4 group, two to a byte."""
    codes = chunk.block_codes[0]
    for k in range(out.size):
        out[k] = codes[2 * k] | (codes[2 * k + 1] << 4)
