"""The canonical FP4 form: every code under every scale, against a definition in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1
from dsv4_quant.kernels.bf16_to_fp4_numba import ZERO_BLOCK_SCALE, bf16_to_fp4_exact
from dsv4_quant.kernels.canonical_fp4_numba import GROUP, ZERO_SCALE, canonical_fp4
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

CODE_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
SCALE_VALUES = np.ldexp(1.0, np.arange(255) - 127)

Bytes = NDArray[np.uint8]


def canonical(codes: Bytes, scales: Bytes) -> tuple[int, Bytes, Bytes]:
    """The kernel on unpacked codes ``[R, C]``."""
    packed = e2m1.pack(codes.astype(np.uint8))
    out, out_scales = np.full_like(packed, 0xAA), np.full_like(scales, 0xAA)
    flags = canonical_fp4(packed, scales, out, out_scales)
    return flags, e2m1.unpack(out), out_scales


def decoded(codes: Bytes, scales: Bytes) -> NDArray[np.float64]:
    return CODE_VALUES[codes] * SCALE_VALUES[scales].repeat(GROUP, 1)


def defined(values: NDArray[np.float64]) -> tuple[Bytes, Bytes]:
    """Codes and scales from the values alone, block by block."""
    blocks = values.reshape(-1, GROUP)
    amax = np.abs(blocks).max(1)
    scales = np.searchsorted(6 * SCALE_VALUES, amax)  # the first one that is no smaller
    scales[amax == 0] = 1
    steps = np.abs(blocks) / SCALE_VALUES[scales][:, None]
    codes = np.searchsorted(CODE_VALUES[:8], steps)
    assert np.array_equal(CODE_VALUES[codes], steps)
    codes += 8 * (blocks < 0)
    shape = values.shape
    return codes.reshape(shape).astype(np.uint8), scales.reshape(shape[0], -1).astype(np.uint8)


def assert_canonical(codes: Bytes, scales: Bytes) -> None:
    flags, found, found_scales = canonical(codes, scales)
    expected, expected_scales = defined(decoded(codes, scales))
    assert flags == 0
    assert np.array_equal(found_scales, expected_scales)
    assert np.array_equal(found, expected)


def test_every_pair_of_codes_under_every_scale() -> None:
    """The largest code decides, the other one goes along; each pair in places of its own."""
    pairs = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 2)
    codes = np.zeros((256, GROUP), np.uint8)
    places = np.arange(256)
    codes[places, places % 31] = pairs[:, 0]
    codes[places, places % 31 + 1] = pairs[:, 1]
    for byte in range(253):
        assert_canonical(codes, np.full((256, 1), byte, np.uint8))


@pytest.mark.parametrize("byte", [253, 254])
def test_what_float32_does_not_hold(byte: int) -> None:
    """Each code alone, so that the flag is its own."""
    for code in range(16):
        codes, scales = np.zeros((1, GROUP), np.uint8), np.array([[byte]], np.uint8)
        codes[0, code] = code
        if abs(CODE_VALUES[code] * SCALE_VALUES[byte]) < 2.0**128:
            assert_canonical(codes, scales)
        else:
            assert canonical(codes, scales)[0] == INEXACT


@pytest.mark.parametrize("code", [0, 3, 7, 15])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_nan_scale_is_flagged(code: int, place: int) -> None:
    scales = np.full((3, 5), 127, np.uint8)
    scales[1, place] = 0xFF
    assert canonical(np.full((3, 160), code), scales)[0] == NAN
    scales[2, 1] = 254
    flags = canonical(np.full((3, 160), code), scales)[0]
    assert flags == NAN | (INEXACT if code >= 7 else 0)


def test_zeros() -> None:
    """Of either sign, under every scale but NaN; both kernels give them the same scale."""
    codes = np.zeros((255, GROUP), np.uint8)
    codes[:, ::3] = 8
    flags, found, scales = canonical(codes, np.arange(255, dtype=np.uint8)[:, None])
    assert flags == 0 and not found.any()
    assert (scales == ZERO_SCALE).all() and ZERO_SCALE == ZERO_BLOCK_SCALE


@st.composite
def panels(draw: st.DrawFn) -> tuple[Bytes, Bytes]:
    """Blocks full of everything, or of small codes, or empty, under near or far scales."""
    rows, groups = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (rows, groups, GROUP))
    codes &= 8 | rng.choice(
        draw(st.sampled_from([[7], [0, 7], [0, 1, 3, 4, 5, 7]])), (rows, groups, 1)
    )
    low, high = sorted((draw(st.integers(0, 252)), draw(st.integers(0, 252))))
    return codes.reshape(rows, -1).astype(np.uint8), rng.integers(
        low, high + 1, (rows, groups), np.uint8
    )


@settings(max_examples=200, deadline=None)
@given(panels())
def test_any_panel(panel: tuple[Bytes, Bytes]) -> None:
    """By definition; what is canonical stays as it is; and by way of BF16 it is the same."""
    codes, scales = panel
    assert_canonical(codes, scales)
    _, found, found_scales = canonical(codes, scales)
    _, again, again_scales = canonical(found, found_scales)
    assert np.array_equal(found, again) and np.array_equal(found_scales, again_scales)
    half = decoded(codes, scales).astype(ml_dtypes.bfloat16).view(np.uint16)
    packed, their_scales = np.empty((len(codes), codes.shape[1] // 2), np.uint8), scales.copy()
    assert bf16_to_fp4_exact(half, GROUP, their_scales, packed, np.zeros(3, np.int64)) == 0
    assert np.array_equal(e2m1.unpack(packed), found)
    assert np.array_equal(their_scales, found_scales)


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (8, 32, 512)) & rng.choice([8, 11, 13, 15], (8, 32, 512))
    scales = rng.integers(0, 253, (8, 32, 16), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(assert_canonical, codes, scales))


def test_wrong_operands_are_refused() -> None:
    packed, scales = np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.uint8)
    with pytest.raises(ValueError, match=r"packed must be a C-contiguous uint8 \[4, 48\]"):
        canonical_fp4(packed, np.zeros((4, 3), np.uint8), packed, scales)
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint8 \[4, 32\]"):
        canonical_fp4(packed, scales, np.zeros((4, 64), np.uint8), scales)
    with pytest.raises(ValueError, match="scales must be a C-contiguous uint8"):
        canonical_fp4(packed, scales.view(np.int8), packed, scales)
