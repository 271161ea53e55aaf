"""FP8 -> BF16 panels against ml_dtypes and float64: every scale byte x every code, any float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.kernels.fp8_to_bf16_numba import fp8_to_bf16
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
SCALE_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
AWKWARD = [0.0, -0.0, 1e-45, 2.0**-127, 3 * 2.0**-128, 1.5, 0.1, -0.25, 1 + 2.0**-23]
AWKWARD += [2.0**-117, 2.0**-118, 2.0**119, 2.0**120, 3e38, np.inf, -np.inf, np.nan]

Codes = NDArray[np.uint8]
Scales = NDArray[Any]


def expected(
    codes: Codes, scales: NDArray[np.float32], canonical: bool
) -> tuple[NDArray[np.uint16], int]:
    """Bits and flags from one scale per value: the float32 product, rounded by ml_dtypes."""
    with np.errstate(all="ignore"):
        bits = (FP8_VALUES[codes] * scales).astype(ml_dtypes.bfloat16)
        exact = FP8_VALUES[codes].astype(np.float64) * scales
    special = ~np.isfinite(exact)
    inexact = (bits.astype(np.float64) != exact) & ~special
    out = np.where(special, 0x7FC0, bits.view(np.uint16))
    if canonical:
        out[out == 0x8000] = 0
    return out, (NAN if special.any() else 0) | (INEXACT if inexact.any() else 0)


def check(
    codes: Codes, scales: Scales, block: tuple[int, int], row0: int = 0, canonical: bool = False
) -> int:
    """Decode, compare with the definition, and return the flags."""
    out = np.full(codes.shape, 0xAAAA, np.uint16)
    flags = fp8_to_bf16(codes, scales, row0, *block, out, canonical)
    values = scales if scales.dtype == np.float32 else SCALE_VALUES[scales]
    grid = values.repeat(block[0], 0).repeat(block[1], 1)
    grid = grid[row0 : row0 + codes.shape[0], : codes.shape[1]]
    bits, expected_flags = expected(codes, grid, canonical)
    different = np.argwhere(out != bits)
    assert not different.size, f"first at {different[0]}: {out[tuple(different[0])]:#x}"
    assert flags == expected_flags
    return flags


@pytest.mark.parametrize("canonical", [False, True])
def test_every_scale_and_code(canonical: bool) -> None:
    """All codes but NaN under each scale byte, in E8M0 and in float32."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(32)[None]
    inexact = []
    for byte in range(256):
        scales = np.full((1, codes.size // 32), byte, np.uint8)
        flags = check(codes, scales, (1, 32), canonical=canonical)
        assert check(codes, SCALE_VALUES[scales], (1, 32), canonical=canonical) == flags
        inexact += [byte] * (flags == INEXACT)
    assert inexact == [0, 1, 2, *range(247, 255)]


def test_every_flag() -> None:
    """Each code alone among zeros, so that the flags are its own."""
    for byte in [0, 1, 2, 3, 9, 10, 127, 246, 247, 253, 254, 255]:
        for code in range(256):
            codes = np.zeros((1, 32), np.uint8)
            codes[0, code % 32] = code
            flags = check(codes, np.array([[byte]], np.uint8), (1, 32))
            assert (flags & NAN != 0) == (byte == 255 or code in e4m3.NAN_CODES)


@pytest.mark.parametrize("scale", AWKWARD)
@pytest.mark.parametrize("canonical", [False, True])
def test_awkward_float32_scales(scale: float, canonical: bool) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    for row in codes:
        flags = check(row[None], np.full((1, 2), scale, np.float32), (1, 32), 0, canonical)
        nan_codes = np.isin(row, e4m3.NAN_CODES).any()
        assert (flags & NAN != 0) == (not np.isfinite(scale) or nan_codes)


def test_minus_zero_is_kept_or_cleared() -> None:
    codes, out = np.full((1, 32), 0x80, np.uint8), np.empty((1, 32), np.uint16)
    scales = np.array([[127]], np.uint8)
    assert fp8_to_bf16(codes, scales, 0, 1, 32, out) == 0 and (out == 0x8000).all()
    assert fp8_to_bf16(codes, scales, 0, 1, 32, out, canonical=True) == 0 and not out.any()


@st.composite
def panels(draw: st.DrawFn) -> tuple[Codes, Scales, tuple[int, int], int]:
    block = draw(st.sampled_from([(128, 128), (32, 32), (1, 32), (3, 64), (2, 48), (5, 7)]))
    rows, row0 = draw(st.integers(1, 140)), draw(st.integers(0, 300))
    cols = draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 128, 256, 288])))
    grid = -(-(row0 + rows) // block[0]) + draw(st.integers(0, 2)), -(-cols // block[1])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, (rows, cols), np.uint8)
    if draw(st.booleans()):
        codes[(codes & 0x7F) == 0x7F] ^= 1
    kind = draw(st.sampled_from(["ordinary bytes", "any byte", "powers of two", "any float"]))
    if kind == "any float":
        return codes, rng.integers(0, 2**32, grid, np.uint32).view(np.float32), block, row0
    low, high = (0, 256) if kind == "any byte" else (100, 130)
    scales = rng.integers(low, high, grid).astype(np.uint8)
    return codes, SCALE_VALUES[scales] if kind == "powers of two" else scales, block, row0


@settings(max_examples=100, deadline=None)
@given(panels(), st.booleans())
def test_any_geometry(panel: tuple[Codes, Scales, tuple[int, int], int], canonical: bool) -> None:
    check(*panel, canonical=canonical)


def test_one_nan_code_leaves_its_neighbours_alone() -> None:
    codes = np.full((3, 256), 0x81, np.uint8)
    codes[1, 200] = 0xFF
    assert check(codes, np.full((1, 2), 120, np.uint8), (128, 128)) == NAN


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (16, 64, 512), np.uint8)
    scales = rng.integers(0, 256, (16, 4), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        flags = list(pool.map(lambda i: check(codes[i], scales, (64, 128), 64 * i), range(16)))
    assert all(f & NAN for f in flags)


def test_wrong_operands_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.zeros((2, 2), np.uint8)
    out = np.empty((4, 64), np.uint16)
    assert fp8_to_bf16(codes, scales, 0, 2, 32, out) == 0
    for row0, block in ((1, (2, 32)), (-1, (2, 32)), (0, (1, 32)), (0, (2, 64))):
        with pytest.raises(ValueError, match="do not cover rows"):
            fp8_to_bf16(codes, scales, row0, *block, out)
    with pytest.raises(ValueError, match="scales must be a C-contiguous uint8"):
        fp8_to_bf16(codes, scales.astype(np.float64), 0, 2, 32, out)
    with pytest.raises(ValueError, match="out must be a C-contiguous uint16"):
        fp8_to_bf16(codes, scales, 0, 2, 32, np.empty((4, 128), np.uint16)[:, ::2])


def test_e8m0_definitions_agree() -> None:
    assert np.array_equal(SCALE_VALUES, e8m0.VALUES, equal_nan=True)
