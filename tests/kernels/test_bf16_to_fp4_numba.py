"""BF16 -> FP4 without loss: every BF16 x every scale, and no block refused that any scale holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1
from dsv4_quant.kernels import bf16_to_fp4_numba as kernel
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

CODE_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
SCALE_VALUES = np.ldexp(1.0, np.arange(255) - 127)
EVERY = np.arange(65536, dtype=np.uint16)
with np.errstate(invalid="ignore"):  # signalling NaNs
    EVERY_VALUE = EVERY.view(ml_dtypes.bfloat16).astype(np.float64)
FINITE = np.isfinite(EVERY_VALUE)

Bits = NDArray[np.uint16]


def bits_of(values: NDArray[np.float64]) -> Bits:
    bits = values.astype(ml_dtypes.bfloat16)
    assert np.array_equal(bits.astype(np.float64), values)
    return bits.view(np.uint16)


HOLDS = np.zeros((255, 65536), np.bool_)
"""``[scale byte, BF16 bits]``: whether the value is a code times the scale. The definition."""
for _byte, _values in enumerate(CODE_VALUES * SCALE_VALUES[:, None]):
    HOLDS[_byte, bits_of(_values[np.abs(_values) < 2.0**128])] = True


class Cast:
    """One panel through both passes."""

    def __init__(self, bits: Bits, group: int = 32) -> None:
        rows, cols = bits.shape
        self.group = group
        self.scales = np.full((rows, cols // group), 0xAA, np.uint8)
        self.packed = np.full((rows, cols // 2), 0xAA, np.uint8)
        self.fault = np.full(3, -1)
        self.status = kernel.bf16_to_fp4_exact(bits, group, self.scales, self.packed, self.fault)

    def values(self) -> NDArray[np.float64]:
        scales = SCALE_VALUES[self.scales].repeat(self.group, 1)
        return CODE_VALUES[e2m1.unpack(self.packed)] * scales


def test_every_magnitude_takes_the_smallest_scale_that_reaches_it() -> None:
    magnitude = np.abs(EVERY_VALUE[FINITE])
    bits = np.zeros((magnitude.size, 32), np.uint16)
    bits[np.arange(magnitude.size), np.arange(magnitude.size) % 32] = EVERY[FINITE]
    scales = np.empty((magnitude.size, 1), np.uint8)
    assert kernel.fp4_scales_exact(bits, 32, scales, np.zeros(3, np.int64)) == 0
    expected = np.searchsorted(6 * SCALE_VALUES, magnitude)  # the first one that is no smaller
    expected[magnitude == 0] = 1
    assert np.array_equal(scales[:, 0], expected)


@njit
def all_codes(
    words: NDArray[np.uint64], base: np.uint64, codes: Bits, faults: NDArray[np.uint64]
) -> None:
    for i in range(words.size):
        codes[i], faults[i] = kernel._four_codes(words[i], base)


def test_every_bf16_under_every_scale() -> None:
    """The fast loop's arithmetic: 65,536 x 253 cases, each judged on its own."""
    codes, faults = np.empty(16384, np.uint16), np.empty(16384, np.uint64)
    for byte in range(2, 255):
        base = np.uint64(((byte - 1) << 7) * 0x0001000100010001)
        all_codes(EVERY.view(np.uint64), base, codes, faults)
        wrong = faults.view(np.uint16) != 0
        exact = HOLDS[byte]
        assert np.array_equal(wrong, ~exact), byte
        found = e2m1.unpack(codes.view(np.uint8))[exact]
        assert np.array_equal(CODE_VALUES[found] * SCALE_VALUES[byte], EVERY_VALUE[exact])
        assert not (found == 8).any()


@pytest.mark.parametrize("byte", [0, 1, 2, 3, 127, 252, 253, 254])
def test_every_verdict(byte: int) -> None:
    """Through the second pass: values on the grid, their neighbours, subnormals, the extremes."""
    values = CODE_VALUES * SCALE_VALUES[byte]
    grid = bits_of(values[np.abs(values) < 2.0**128])
    near = np.concatenate([grid, grid + 1, grid - 1, EVERY[:300], EVERY[0x7F00:0x8100]])
    scales, out = np.array([[byte]], np.uint8), np.empty((1, 16), np.uint8)
    fault = np.zeros(3, np.int64)
    for value in near.astype(np.uint16):
        bits = np.zeros((1, 32), np.uint16)
        bits[0, value % 32] = value
        status = kernel.fp4_codes_exact(bits, 32, scales, out, fault)
        exact = HOLDS[byte, value]
        assert status == (0 if exact else INEXACT), hex(value)
        if exact:
            decoded = CODE_VALUES[e2m1.unpack(out)] * SCALE_VALUES[byte]
            assert np.array_equal(decoded, EVERY_VALUE[bits])
        else:
            assert fault.tolist() == [0, value % 32, value]


def test_a_nan_scale_holds_nothing() -> None:
    scales, out = np.array([[255]], np.uint8), np.empty((1, 16), np.uint8)
    fault = np.zeros(3, np.int64)
    for value in (0x0000, 0x8000, 0x3F80, 0x7F00):
        bits = np.full((1, 32), value, np.uint16)
        assert kernel.fp4_codes_exact(bits, 32, scales, out, fault) == INEXACT


@st.composite
def panels(draw: st.DrawFn) -> tuple[Bits, int]:
    """Values on or near the grid of some scale, per block; sometimes anything finite."""
    rows, groups = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    group = draw(st.sampled_from([32, 64, 128]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (rows, groups, group))
    if draw(st.booleans()):
        codes &= ~rng.integers(0, 8, (rows, groups, 1))  # not every block holds a 6
    low, high = sorted((draw(st.integers(0, 252)), draw(st.integers(0, 252))))
    scales = SCALE_VALUES[rng.integers(low, high + 1, (rows, groups, 1))]
    bits = bits_of((CODE_VALUES[codes] * scales).reshape(rows, -1)).copy()
    for _ in range(draw(st.integers(0, 2))):
        bits[rng.integers(rows), rng.integers(bits.shape[1])] ^= draw(st.integers(0, 0xFF))
    return bits, group


@settings(max_examples=150, deadline=None)
@given(panels())
def test_a_block_is_refused_only_if_no_scale_holds_it(panel: tuple[Bits, int]) -> None:
    """Brute force over all 255 scales; the scale that is taken is the finest that reaches amax."""
    bits, group = panel
    cast = Cast(bits, group)
    values = EVERY_VALUE[bits].reshape(-1, group)
    if not np.isfinite(values).all():
        row, col = np.argwhere(~np.isfinite(EVERY_VALUE[bits]))[0]
        assert (cast.status, cast.fault.tolist()) == (NAN, [row, col, bits[row, col]])
        return
    held = HOLDS[:, bits.reshape(-1, group)].all(2).any(0)
    if held.all():
        assert cast.status == 0 and (cast.fault == -1).all()
        assert np.array_equal(cast.values(), EVERY_VALUE[bits])
        assert not (e2m1.unpack(cast.packed) == 8).any()
    else:
        assert cast.status == INEXACT
        row, col, value = cast.fault
        assert value == bits[row, col]
        assert held.argmin() == row * cast.scales.shape[1] + col // group
        assert not HOLDS[cast.scales[row, col // group], value]


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF])
def test_infinities_and_nans_are_named(value: int) -> None:
    bits = np.full((3, 128), 0x3F80, np.uint16)
    bits[1, 99], bits[2, 0] = value, 0x7FC0
    cast = Cast(bits, 64)
    assert (cast.status, cast.fault.tolist()) == (NAN, [1, 99, value])


def test_zeros() -> None:
    """A block of zeros takes the published floor: amax is clamped to 6 * 2^-126."""
    bits = np.zeros((2, 64), np.uint16)
    bits[:, ::3] = 0x8000
    cast = Cast(bits)
    assert cast.status == 0
    assert not cast.packed.any()
    floor = 2.0 ** np.ceil(np.log2(max(0.0, 6 * 2.0**-126) / 6))
    assert (SCALE_VALUES[cast.scales] == floor).all()


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (16, 64, 512))
    scales = SCALE_VALUES[rng.integers(100, 130, (16, 64, 512 // 32, 1))]
    values = CODE_VALUES[codes] * scales.repeat(32, -1).reshape(codes.shape)
    with ThreadPoolExecutor(2) as pool:
        casts = list(pool.map(Cast, bits_of(values)))
    for cast, panel in zip(casts, values, strict=True):
        assert cast.status == 0
        assert np.array_equal(cast.values(), panel)


def test_wrong_operands_are_refused() -> None:
    bits = np.zeros((4, 96), np.uint16)
    for group in (48, 64):
        with pytest.raises(ValueError, match=f"96 columns cannot be coded in groups of {group}"):
            Cast(bits, group)
    with pytest.raises(ValueError, match="bits must be a C-contiguous uint16"):
        Cast(bits.astype(np.int16))
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint8 \[4, 48\]"):
        kernel.fp4_codes_exact(
            bits, 32, np.ones((4, 3), np.uint8), np.zeros((4, 96), np.uint8), np.zeros(3, np.int64)
        )
