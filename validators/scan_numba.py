"""The loops of ``scan``: 64-bit words of codes, eight FP8 or sixteen FP4 codes at once.

Lanes keep their sign bit clear, so that adding a constant to all of them never carries into a
neighbour: that is how "at least" is asked of eight bytes in one addition. What the loops count
goes into ``counts``, at the places DEAD, DEAD_RUN, SATURATED, SLACK and NANS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import U64, inline, kernel

Words = NDArray[np.uint64]
Counts = NDArray[np.int64]

DEAD, DEAD_RUN, SATURATED, SLACK, NANS = range(5)

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
HALF_LANES = U64(0x7FFF7FFF7FFF7FFF), U64(0x8000800080008000), U64(0x3880388038803880)
SINGLE_LANES = U64(0x7FFFFFFF7FFFFFFF), U64(0x8000000080000000), U64(0x3880000038800000)


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
def scan_fp4(words: Words, exponent: NDArray[np.uint8], counts: Counts, exponents: Counts) -> None:
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
        counts[DEAD] += dead
        counts[SATURATED] += saturated
        counts[SLACK] += slack - dead
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
            counts[DEAD_RUN] = max(counts[DEAD_RUN], run)
        else:
            run = 0
            exponents[exponent[block]] += 1
    return run


@kernel
def scan_fp8(
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
            counts[SATURATED] += 2 * largest[block] >= size
            counts[SLACK] += high[block] == U64(0)
        counts[DEAD] += dead
        counts[SLACK] -= dead
        run = _count_live(seen, exponent[start // rows], dead, run, counts, exponents)
    counts[NANS] = np.int64(nans)


@kernel
def scan_plain(
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
