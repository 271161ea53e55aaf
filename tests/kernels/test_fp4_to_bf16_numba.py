"""FP4 -> BF16 panels against ml_dtypes: every scale byte x every code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e8m0
from dsv4_quant.kernels.fp4_to_bf16_numba import fp4_to_bf16
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
FP4_VALUES[8] = 0.0  # the published table has no -0


def expected(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], int]:
    """Bits and flags, from float64 values rounded by ml_dtypes."""
    exponents = scales.repeat(codes.shape[1] // scales.shape[1], 1)
    values = np.ldexp(FP4_VALUES[codes], exponents.astype(int) - 127)
    bits = values.astype(ml_dtypes.bfloat16)
    nan = exponents == 255
    inexact = (bits.astype(np.float64) != values) & ~nan
    flags = (INEXACT if inexact.any() else 0) | (NAN if nan.any() else 0)
    return np.where(nan, 0x7FC0, bits.view(np.uint16)), flags


def decode(codes: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], int]:
    out = np.full(codes.shape, 0xAAAA, np.uint16)
    group = codes.shape[1] // scales.shape[1]
    return out, fp4_to_bf16(e2m1.pack(codes), scales, group, out)


def test_every_scale_and_code() -> None:
    """Each code alone among zeros, so that the flags are its own."""
    for byte, code in np.ndindex(256, 16):
        codes = np.zeros((2, 64), np.uint8)
        codes[0, code], codes[1, 63 - code] = code, code
        scales = np.full((2, 2), byte, np.uint8)
        found, flags = decode(codes, scales)
        bits, expected_flags = expected(codes, scales)
        assert np.array_equal(found, bits), (byte, code)
        assert flags == expected_flags, (byte, code)
        beyond_bf16 = abs(FP4_VALUES[code]) * 2.0 ** (byte - 127) >= 2.0**128
        assert flags == (NAN if byte == 255 else INEXACT if beyond_bf16 else 0)


@st.composite
def panels(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    group = draw(st.sampled_from([32, 64, 96, 128]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted((draw(st.integers(0, 255)), draw(st.integers(0, 255))))
    codes = rng.integers(0, 16, (rows, groups * group), np.uint8)
    return codes, rng.integers(low, high + 1, (rows, groups)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(panels())
def test_any_geometry(panel: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    found, flags = decode(*panel)
    bits, expected_flags = expected(*panel)
    assert np.array_equal(found, bits)
    assert flags == expected_flags


def test_output_is_canonical() -> None:
    codes, scales = np.full((1, 32), 8, np.uint8), np.array([[e8m0.BIAS]], np.uint8)
    assert not decode(codes, scales)[0].any()


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    work = [
        (rng.integers(0, 16, (64, 512), np.uint8), rng.integers(0, 256, (64, 16), np.uint8))
        for _ in range(16)
    ]
    with ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(lambda w: decode(*w), work))
    for panel, (found, flags) in zip(work, threaded, strict=True):
        alone, alone_flags = decode(*panel)
        assert np.array_equal(found, alone)
        assert flags == alone_flags == INEXACT | NAN


def test_wrong_operands_are_refused() -> None:
    packed, scales = np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.uint8)
    with pytest.raises(ValueError, match="group of 48 columns"):
        fp4_to_bf16(packed, scales, 48, np.empty((4, 64), np.uint16))
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint16 \[4, 64\]"):
        fp4_to_bf16(packed, scales, 32, np.empty((4, 64), np.int16))
    with pytest.raises(ValueError, match=r"packed must be a C-contiguous uint8 \[4, 64\]"):
        fp4_to_bf16(packed, scales, 64, np.empty((4, 128), np.uint16))
