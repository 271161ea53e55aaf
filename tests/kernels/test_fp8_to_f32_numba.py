"""FP8 -> float32 panels against the float32 product: every code x scale byte, any float32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.kernels.fp8_to_f32_numba import fp8_to_f32
from dsv4_quant.kernels.jit_numba import INEXACT, NAN


def check(
    codes: NDArray[np.uint8], scales: NDArray[Any], block: tuple[int, int], row0: int = 0
) -> int:
    """Decode, compare with the definition, and return the flags."""
    out = np.full(codes.shape, 7, np.float32)
    flags = fp8_to_f32(codes, scales, row0, *block, out)
    values = scales if scales.dtype == np.float32 else e8m0.VALUES[scales]
    grid = values.repeat(block[0], 0).repeat(block[1], 1)
    grid = grid[row0 : row0 + codes.shape[0], : codes.shape[1]]
    with np.errstate(all="ignore"):
        product = e4m3.VALUES[codes] * grid
        exact = e4m3.VALUES[codes].astype(np.float64) * grid
    nan = np.isnan(product)
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(out.view(np.uint32)[~nan], product.view(np.uint32)[~nan])
    special = ~np.isfinite(exact)
    rounded = (product != exact) & ~special
    assert flags == (NAN if special.any() else 0) | (INEXACT if rounded.any() else 0)
    return flags


def test_every_scale_and_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(32)[None]
    for byte in range(256):
        scales = np.full((1, codes.size // 32), byte, np.uint8)
        flags = check(codes, scales, (1, 32))
        assert flags == (NAN if byte == 255 else INEXACT if byte > 246 else 0)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 0.1, 0.75, -3.0, 1 + 2.0**-23, np.inf, np.nan])
def test_float32_scales(scale: float) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    flags = {check(codes[i : i + 1], np.array([[scale]], np.float32), (1, 128)) for i in (0, 1)}
    assert all(f & NAN for f in flags)  # either row holds a NaN code
    codes[codes & 0x7F == 0x7F] = 0
    flags = check(codes, np.array([[scale]], np.float32), (2, 128))
    exact = scale in (0.0, 0.75, -3.0)
    assert flags == (NAN if not np.isfinite(scale) else 0 if exact else INEXACT)


@st.composite
def panels(
    draw: st.DrawFn,
) -> tuple[NDArray[np.uint8], NDArray[Any], tuple[int, int], int]:
    block = draw(st.sampled_from([(128, 128), (32, 32), (1, 32), (5, 7)]))
    rows, row0 = draw(st.integers(1, 40)), draw(st.integers(0, 300))
    cols = draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 128, 256, 288])))
    grid = -(-(row0 + rows) // block[0]), -(-cols // block[1])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, (rows, cols), np.uint8)
    if draw(st.booleans()):
        return codes, rng.integers(0, 256, grid).astype(np.uint8), block, row0
    return codes, rng.integers(0, 2**32, grid, np.uint32).view(np.float32), block, row0


@settings(max_examples=60, deadline=None)
@given(panels())
def test_any_geometry(
    panel: tuple[NDArray[np.uint8], NDArray[Any], tuple[int, int], int],
) -> None:
    check(*panel)


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, (16, 64, 512), np.uint8)
    scales = rng.normal(size=(16, 4)).astype(np.float32)
    with ThreadPoolExecutor(2) as pool:
        flags = set(pool.map(lambda i: check(codes[i], scales, (64, 128), 64 * i), range(16)))
    assert flags == {INEXACT | NAN}


def test_wrong_operands_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="out must be a C-contiguous float32"):
        fp8_to_f32(codes, scales, 0, 2, 32, np.empty((4, 64), np.float64))
    with pytest.raises(ValueError, match="do not cover rows 1 to 5"):
        fp8_to_f32(codes, scales, 1, 2, 32, np.empty((4, 64), np.float32))
