"""The canonical form of every BF16 and of many float32, against numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import bf16
from dsv4_quant.kernels.canonical_numba import canonical_bf16, canonical_f32, f32_to_bf16
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

EVERY = np.arange(65536, dtype=np.uint16)
IS_NAN = np.isnan(bf16.decode(EVERY))
WORDS = [0x00000000, 0x80000000, 0x3F800000, 0x3F800001, 0x3F80FFFF, 0x00000001, 0x8000FFFF]
WORDS += [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F800001, 0x7FC00000, 0xFFC00000, 0xFFFFFFFF]


def test_every_bf16() -> None:
    """Together, and each alone in each lane, so that the flag is its own."""
    out = np.empty_like(EVERY)
    assert canonical_bf16(EVERY, out) == NAN
    assert np.array_equal(out, np.where(EVERY == 0x8000, 0, EVERY))
    numbers = EVERY[~IS_NAN].copy()
    assert canonical_bf16(numbers, numbers) == 0
    assert np.array_equal(numbers, out[~IS_NAN])
    for value in EVERY[IS_NAN]:
        alone = np.zeros(4, np.uint16)
        alone[value % 4] = value
        assert canonical_bf16(alone, alone) == NAN
        assert alone[value % 4] == value


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_float32_flags(word: int, place: int) -> None:
    bits = np.zeros(3, np.uint32)
    bits[place] = word
    out = np.empty(3, np.float32)
    flags = canonical_f32(bits.view(np.float32), out)
    nan = np.isnan(bits.view(np.float32)).any()
    assert flags == (NAN if nan else 0) | (INEXACT if word & 0xFFFF else 0)
    assert out.view(np.uint32)[place] == (0 if word == 0x80000000 else word)
    upper = np.empty(3, np.uint16)
    assert f32_to_bf16(bits.view(np.float32), upper) == (INEXACT if word & 0xFFFF else 0)
    assert upper[place] == word >> 16


@st.composite
def arrays(draw: st.DrawFn) -> NDArray[np.uint32]:
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = rng.integers(0, 2**32, shape, np.uint32)
    bits &= np.uint32(draw(st.sampled_from([0xFFFFFFFF, 0xFFFF0000, 0x80000000, 0x7F800000])))
    return bits


@settings(max_examples=150, deadline=None)
@given(arrays(), st.booleans())
def test_any_shape(bits: NDArray[np.uint32], in_place: bool) -> None:
    values = bits.view(np.float32)
    out = values.copy() if in_place else np.full_like(values, 7)
    flags = canonical_f32(out if in_place else values, out)
    expected = np.where(values == 0, np.float32(0), values)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    nan, inexact = np.isnan(values).any(), not bf16.is_exact(values).all()
    assert flags == (NAN if nan else 0) | (INEXACT if inexact else 0)
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    narrow = np.full(bits.shape, 7, np.uint16)
    assert f32_to_bf16(values, narrow) == (INEXACT if inexact else 0)
    assert np.array_equal(narrow, upper)
    out16 = upper.copy() if in_place else np.full_like(upper, 7)
    flags = canonical_bf16(out16 if in_place else upper, out16)
    assert flags == (NAN if np.isnan(bf16.decode(upper)).any() else 0)
    assert np.array_equal(out16, np.where(upper == 0x8000, 0, upper))


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2, (16, 100_001)).astype(np.uint16) << np.uint16(15)
    out = np.full_like(bits, 7)
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda i: canonical_bf16(bits[i], out[i]), range(16))) == {0}
    assert not out.any()


def test_wrong_operands_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint16 \[3\]"):
        canonical_bf16(np.zeros(3, np.uint16), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="values must be a C-contiguous float32"):
        canonical_f32(np.zeros((4, 4), np.float32).T[:2], np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="values must be a C-contiguous float32"):
        f32_to_bf16(np.zeros(3), np.zeros(3, np.uint16))
