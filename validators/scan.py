"""What the stored numbers of one panel look like, counted at memory speed.

Three things are counted per block of a quantised weight (a *block* shares one scale):

- dead: every code is zero. A long stretch of them is a hole in a file, not a weight.
- saturated: half of the codes or more have the largest magnitude (6 or 448): a scale far too small.
- slack: the largest magnitude is at most a quarter of the format's largest (1.5 or 112): a scale
  far too large, which wastes two of the few bits. Dead blocks are not slack.

The loops look at 64-bit words of codes: eight FP8 or sixteen FP4 codes at once. Lanes keep their
sign bit clear, so that adding a constant to all of them never carries into a neighbour.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.kernels.jit_numba import U64, inline, kernel
from dsv4_quant.validators.tally import Tally

Words = NDArray[np.uint64]
Counts = NDArray[np.int64]

HUGE = 65536.0
"""No weight of a language model is as large; a flipped exponent bit makes such numbers."""

_DEAD, _DEAD_RUN, _SATURATED, _SLACK, _NANS = range(5)

_NIBBLE_MAGNITUDES = U64(0x7777777777777777)
_NIBBLE_TOP = U64(0x4444444444444444)  # set from 2.0 on
_NIBBLE_LOW = U64(0x1111111111111111)
_EVEN_NIBBLES = U64(0x0F0F0F0F0F0F0F0F)
_BYTES = U64(0x0101010101010101)
_BYTE_MAGNITUDES = U64(0x7F7F7F7F7F7F7F7F)
_BYTE_SIGNS = U64(0x8080808080808080)
_TO_QUARTER = U64(0x80 - 0x6F) * _BYTES  # reaches the sign bit for all beyond 112 (0x6E)
_TO_LARGEST = U64(0x80 - 0x7E) * _BYTES  # for 448 and NaN
# Magnitudes, signs, and what makes 65536 (0x4780 in BF16, 0x47800000 in F32) reach the sign:
_HALF_LANES = U64(0x7FFF7FFF7FFF7FFF), U64(0x8000800080008000), U64(0x3880388038803880)
_SINGLE_LANES = U64(0x7FFFFFFF7FFFFFFF), U64(0x8000000080000000), U64(0x3880000038800000)


def scan(panel: Tensor, first_row: int) -> Tally:
    """Counts a panel of rows that begin at ``first_row`` of their weight."""
    kind = panel.format.kind
    if kind in ("fp4", "fp8"):
        return _scan_quantised(panel, first_row)
    tally = Tally(values=panel.codes.size)
    if kind == "i64":
        return tally
    plain = np.ascontiguousarray(panel.codes).reshape(1, -1).view(np.uint8)
    words = _as_words(plain, plain.size).reshape(-1)
    masks = _HALF_LANES if kind == "bf16" else _SINGLE_LANES
    suspicious, run = _scan_plain(words, *masks)
    tally.zero_run = run * 8 // panel.codes.itemsize
    if suspicious:
        _look_closer(panel, first_row, tally)
    return tally


def _look_closer(panel: Tensor, first_row: int, tally: Tally) -> None:
    """Counts and finds what is not finite, or beyond all measure."""
    decoded = panel.decode()
    values = decoded.reshape(-1, decoded.shape[-1])
    finite = np.isfinite(values)
    tally.note_bad(~finite, first_row, values)
    tally.note_huge(finite & (np.abs(values) >= HUGE), first_row, values)


def _scan_quantised(panel: Tensor, first_row: int) -> Tally:
    form, codes, scales = panel.format, panel.codes, panel.scales
    assert form.block is not None and scales is not None
    b, c = form.block
    counts = np.zeros(5, np.int64)
    exponents = np.zeros(256, np.int64)
    exponent = scales if form.scale == "e8m0" else (scales.view(np.uint32) >> 23).astype(np.uint8)
    if form.kind == "fp4":
        _scan_fp4(_as_words(codes, c // 2), exponent, counts, exponents)
    else:
        _scan_fp8(_as_words(codes, c), exponent, b, -(-c // 8), c * b, counts, exponents)
    tally = Tally(values=codes.size * (2 if form.kind == "fp4" else 1), blocks=scales.size)
    tally.dead, tally.saturated = int(counts[_DEAD]), int(counts[_SATURATED])
    tally.slack, tally.zero_run = int(counts[_SLACK]), int(counts[_DEAD_RUN]) * b * c
    tally.exponents = exponents
    if counts[_NANS]:
        is_nan = (codes & 0x7F) == e4m3.NAN_CODES[0]
        tally.note_bad(is_nan, first_row, codes)
    is_e8m0 = form.scale == "e8m0"
    bad = scales == e8m0.NAN if is_e8m0 else ~(np.isfinite(scales) & (scales > 0))
    if bad.any():
        tally.note_scales(bad, first_row // b, scales)
    return tally


def _as_words(codes: NDArray[Any], block_bytes: int) -> Words:
    """``[R, bytes]`` -> ``[R, words]``: each block's bytes padded with zeros to whole words."""
    rows, width = codes.shape
    padded = -(-block_bytes // 8) * 8
    if block_bytes == padded and width % padded == 0:
        return np.ascontiguousarray(codes).view(np.uint64)
    blocks = -(-width // block_bytes)
    whole = np.zeros((rows, blocks * block_bytes), np.uint8)
    whole[:, :width] = codes
    out = np.zeros((rows, blocks, padded), np.uint8)
    out[:, :, :block_bytes] = whole.reshape(rows, blocks, block_bytes)
    return out.reshape(rows, -1).view(np.uint64)


@inline
def _lane_bits(word: np.uint64) -> np.uint64:
    """How many of a word's byte lanes have their sign bit set."""
    return (((word & _BYTE_SIGNS) >> U64(7)) * _BYTES) >> U64(56)


@inline
def _full_nibbles(magnitude: np.uint64) -> np.uint64:
    """How many of a word's FP4 magnitudes are the largest, 7."""
    full = magnitude & (magnitude >> U64(1)) & (magnitude >> U64(2)) & _NIBBLE_LOW
    pairs = (full & _EVEN_NIBBLES) + ((full >> U64(4)) & _EVEN_NIBBLES)
    return (pairs * _BYTES) >> U64(56)


@kernel
def _scan_fp4(words: Words, exponent: NDArray[np.uint8], counts: Counts, exponents: Counts) -> None:
    """One block is two words of a row."""
    blocks = exponent.shape[1]
    seen = np.empty(blocks, np.uint64)
    run = 0
    for row in range(words.shape[0]):
        dead, saturated, slack = 0, 0, 0
        for block in range(blocks):
            one = words[row, 2 * block] & _NIBBLE_MAGNITUDES
            two = words[row, 2 * block + 1] & _NIBBLE_MAGNITUDES
            any_code = one | two
            seen[block] = any_code
            dead += int(any_code == U64(0))
            saturated += int(_full_nibbles(one) + _full_nibbles(two) >= U64(16))
            slack += int((any_code & _NIBBLE_TOP) == U64(0))
        counts[0] += dead
        counts[2] += saturated
        counts[3] += slack - dead
        run = _count_live(seen, exponent[row], dead, run, counts, exponents)


@inline
def _count_live(
    seen: Words, exponent: NDArray[np.uint8], dead: int, run: int, counts: Counts, exponents: Counts
) -> int:
    """Counts the scales of live blocks; returns how many dead ones stand at the row's end."""
    if dead == 0:
        for block in range(len(seen)):
            exponents[exponent[block]] += 1
        return 0
    for block in range(len(seen)):
        if seen[block] == U64(0):
            run += 1
            counts[1] = max(counts[1], run)
        else:
            run = 0
            exponents[exponent[block]] += 1
    return run


@kernel
def _scan_fp8(
    words: Words,
    exponent: NDArray[np.uint8],
    rows: int,
    width: int,
    size: int,
    counts: Counts,
    exponents: Counts,
) -> None:
    """One block is ``rows`` rows of ``width`` words, and ``size`` codes."""
    blocks = exponent.shape[1]
    seen = np.empty(blocks, np.uint64)
    high = np.empty(blocks, np.uint64)
    largest = np.empty(blocks, np.int64)
    nans, run = U64(0), 0
    for start in range(0, words.shape[0], rows):
        seen[:], high[:], largest[:] = U64(0), U64(0), 0
        for row in range(start, min(start + rows, words.shape[0])):
            for block in range(blocks):
                any_code, any_high, full = U64(0), U64(0), U64(0)
                for at in range(block * width, (block + 1) * width):
                    magnitude = words[row, at] & _BYTE_MAGNITUDES
                    any_code |= magnitude
                    any_high |= magnitude + _TO_QUARTER
                    full += _lane_bits(magnitude + _TO_LARGEST)
                    nans += _lane_bits(magnitude + _BYTES)
                seen[block] |= any_code
                high[block] |= any_high & _BYTE_SIGNS
                largest[block] += np.int64(full)
        dead = 0
        for block in range(blocks):
            dead += seen[block] == U64(0)
            counts[2] += 2 * largest[block] >= size
            counts[3] += high[block] == U64(0)
        counts[0] += dead
        counts[3] -= dead
        run = _count_live(seen, exponent[start // rows], dead, run, counts, exponents)
    counts[4] = np.int64(nans)


@kernel
def _scan_plain(
    words: Words, magnitudes: np.uint64, signs: np.uint64, to_huge: np.uint64
) -> tuple[bool, int]:
    """Whether a value is huge or not finite; the longest stretch of words that are all zero."""
    suspicious = U64(0)
    zeros = 0
    for at in range(len(words)):
        magnitude = words[at] & magnitudes
        suspicious |= magnitude + to_huge
        zeros += magnitude == U64(0)
    run, longest = 0, 0
    if zeros:
        for at in range(len(words)):
            run = run + 1 if (words[at] & magnitudes) == U64(0) else 0
            longest = max(longest, run)
    return (suspicious & signs) != U64(0), longest
