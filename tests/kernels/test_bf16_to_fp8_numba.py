"""BF16 -> FP8 without loss: every BF16 x every scale, and no tile refused that any scale holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray

from dsv4_quant.kernels import bf16_to_fp8_numba as kernel
from dsv4_quant.kernels.jit_numba import INEXACT, NAN

CODE_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NUMBERS = CODE_VALUES[~np.isnan(CODE_VALUES)]
SCALE_VALUES = np.ldexp(1.0, np.arange(255) - 127)
EVERY = np.arange(65536, dtype=np.uint16)
with np.errstate(invalid="ignore"):  # signalling NaNs
    EVERY_VALUE = EVERY.view(ml_dtypes.bfloat16).astype(np.float64)
FINITE = np.isfinite(EVERY_VALUE)

HOLDS = np.zeros((255, 65536), np.bool_)
"""``[scale byte, BF16 bits]``: whether the value is a code times the scale. The definition."""
for _byte, _values in enumerate(NUMBERS * SCALE_VALUES[:, None]):
    with np.errstate(over="ignore"):
        _bits = _values.astype(ml_dtypes.bfloat16)
    HOLDS[_byte, _bits.view(np.uint16)[_bits.astype(np.float64) == _values]] = True

Bits = NDArray[np.uint16]


class Cast:
    """One panel through both passes."""

    def __init__(self, bits: Bits, block: tuple[int, int]) -> None:
        rows, cols = bits.shape
        self.block = block
        self.scales = np.full((-(-rows // block[0]), -(-cols // block[1])), 0xAA, np.uint8)
        self.codes = np.full((rows, cols), 0xAA, np.uint8)
        self.fault = np.full(3, -1)
        self.status = kernel.bf16_to_fp8_exact(bits, *block, self.scales, self.codes, self.fault)

    def values(self) -> NDArray[np.float64]:
        rows, cols = self.codes.shape
        scales = SCALE_VALUES[self.scales].repeat(self.block[0], 0).repeat(self.block[1], 1)
        return CODE_VALUES[self.codes] * scales[:rows, :cols]


def test_every_magnitude_takes_the_smallest_scale_that_reaches_it() -> None:
    magnitude = np.abs(EVERY_VALUE[FINITE])
    bits = np.zeros((magnitude.size, 32), np.uint16)
    bits[np.arange(magnitude.size), np.arange(magnitude.size) % 32] = EVERY[FINITE]
    scales = np.empty((magnitude.size, 1), np.uint8)
    assert kernel.fp8_scales_exact(bits, 1, 32, scales, np.zeros(3, np.int64)) == 0
    expected = np.searchsorted(448 * SCALE_VALUES, magnitude)  # the first one that is no smaller
    expected[magnitude == 0] = 105
    assert np.array_equal(scales[:, 0], expected)


@njit
def all_codes(
    words: NDArray[np.uint64],
    base: np.uint64,
    codes: NDArray[np.uint32],
    faults: NDArray[np.uint64],
) -> None:
    for i in range(words.size):
        codes[i], faults[i] = kernel._four_codes(words[i], base)


def test_every_bf16_under_every_scale() -> None:
    """The fast loop's arithmetic: 65,536 x 245 cases, each judged on its own."""
    codes, faults = np.empty(16384, np.uint32), np.empty(16384, np.uint64)
    for byte in range(10, 255):
        base = np.uint64(((byte - 9) << 7) * 0x0001000100010001)
        all_codes(EVERY.view(np.uint64), base, codes, faults)
        wrong = faults.view(np.uint16) != 0
        exact = HOLDS[byte]
        assert np.array_equal(wrong, ~exact), byte
        values = CODE_VALUES[codes.view(np.uint8)[exact]] * SCALE_VALUES[byte]
        assert np.array_equal(values, EVERY_VALUE[exact])
        assert np.array_equal(np.signbit(values), np.signbit(EVERY_VALUE[exact]))  # -0 too


@pytest.mark.parametrize("byte", [0, 1, 2, 9, 10, 127, 246, 247, 254])
def test_every_verdict(byte: int) -> None:
    """Through the second pass: values on the grid, their neighbours, subnormals, the extremes."""
    grid = np.flatnonzero(HOLDS[byte])
    near = np.concatenate([grid, grid + 1, grid - 1, EVERY[:300], EVERY[0x7F00:0x8100]]) % 65536
    scales, out = np.array([[byte]], np.uint8), np.empty((1, 32), np.uint8)
    fault = np.zeros(3, np.int64)
    for value in near:
        bits = np.zeros((1, 32), np.uint16)
        bits[0, value % 32] = value
        status = kernel.fp8_codes_exact(bits, 1, 32, scales, out, fault)
        assert status == (0 if HOLDS[byte, value] else INEXACT), hex(value)
        if status:
            assert fault.tolist() == [0, value % 32, value]
        else:
            assert np.array_equal(CODE_VALUES[out] * SCALE_VALUES[byte], EVERY_VALUE[bits])


def test_a_nan_scale_holds_nothing() -> None:
    scales, out = np.array([[255]], np.uint8), np.empty((1, 32), np.uint8)
    fault = np.zeros(3, np.int64)
    for value in (0x0000, 0x8000, 0x3F80, 0x7F00):
        bits = np.full((1, 32), value, np.uint16)
        assert kernel.fp8_codes_exact(bits, 1, 32, scales, out, fault) == INEXACT


@st.composite
def panels(draw: st.DrawFn) -> tuple[Bits, tuple[int, int]]:
    """Values on or near the grid of some scale, per tile; sometimes anything."""
    block = draw(st.sampled_from([(128, 128), (32, 32), (1, 32), (3, 64), (2, 48), (5, 7)]))
    rows, cols = draw(st.integers(1, 70)), draw(st.sampled_from([1, 32, 50, 64, 96, 128, 224]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted((draw(st.integers(6, 246)), draw(st.integers(6, 246))))
    tiles = -(-rows // block[0]), -(-cols // block[1])
    scales = SCALE_VALUES[rng.integers(low, high + 1, tiles)]
    scales = scales.repeat(block[0], 0).repeat(block[1], 1)[:rows, :cols]
    numbers = NUMBERS[np.abs(NUMBERS) <= draw(st.sampled_from([0.0, 2.0**-6, 1.0, 448.0]))]
    bits = (rng.choice(numbers, (rows, cols)) * scales).astype(ml_dtypes.bfloat16).view(np.uint16)
    for _ in range(draw(st.integers(0, 2))):
        bits[rng.integers(rows), rng.integers(cols)] ^= draw(st.integers(0, 0xFFFF))
    return bits, block


@settings(max_examples=150, deadline=None)
@given(panels())
def test_a_tile_is_refused_only_if_no_scale_holds_it(panel: tuple[Bits, tuple[int, int]]) -> None:
    """Brute force over all 255 scales; the scale that is taken is the finest that reaches amax."""
    bits, block = panel
    cast = Cast(bits, block)
    infinite = np.argwhere(~FINITE[bits])
    if infinite.size:
        strip = infinite[:, 0] // block[0] == infinite[0, 0] // block[0]
        row, col = infinite[strip][0]
        assert (cast.status, cast.fault.tolist()) == (NAN, [row, col, bits[row, col]])
        return
    held = np.zeros(cast.scales.shape, np.bool_)
    for i, j in np.ndindex(held.shape):
        tile = bits[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        held[i, j] = HOLDS[:, tile.ravel()].all(1).any()
    if held.all():
        assert cast.status == 0 and (cast.fault == -1).all()
        assert np.array_equal(cast.values(), EVERY_VALUE[bits])
        assert np.array_equal(cast.codes >> 7, bits >> 15)
    else:
        row, col, value = cast.fault
        assert (cast.status, value) == (INEXACT, bits[row, col])
        assert not held[row // block[0], col // block[1]]
        assert not HOLDS[cast.scales[row // block[0], col // block[1]], value]
        assert row // block[0] == np.argwhere(~held)[0, 0]


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF])
def test_infinities_and_nans_are_named(value: int) -> None:
    bits = np.full((5, 128), 0x3F80, np.uint16)
    bits[1, 127], bits[2, 0], bits[4, 0] = value, 0x7FC0, 0x7FC0
    cast = Cast(bits, (3, 32))
    assert (cast.status, cast.fault.tolist()) == (NAN, [1, 127, value])


def test_zeros() -> None:
    """A tile of zeros takes the published floor, amax clamped to 1e-4; -0 keeps its sign."""
    bits = np.zeros((2, 64), np.uint16)
    bits[:, ::3] = 0x8000
    cast = Cast(bits, (2, 32))
    assert cast.status == 0
    assert np.array_equal(cast.codes, bits >> 8)
    floor = 2.0 ** np.ceil(np.log2(np.float32(1e-4) / 448))
    assert (SCALE_VALUES[cast.scales] == floor).all()


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    values = rng.choice(NUMBERS, (16, 64, 512)) * SCALE_VALUES[rng.integers(100, 130, (16, 1, 1))]
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    with ThreadPoolExecutor(2) as pool:
        casts = list(pool.map(lambda panel: Cast(panel, (32, 128)), bits))
    for cast, panel in zip(casts, values, strict=True):
        assert cast.status == 0
        assert np.array_equal(cast.values(), panel)


def test_wrong_operands_are_refused() -> None:
    bits = np.zeros((4, 96), np.uint16)
    with pytest.raises(ValueError, match="bits must be a C-contiguous uint16"):
        Cast(bits.astype(np.int16), (2, 32))
    scales, fault = np.ones((2, 3), np.uint8), np.zeros(3, np.int64)
    with pytest.raises(ValueError, match=r"scales must be a C-contiguous uint8 \[4, 3\]"):
        kernel.fp8_scales_exact(bits, 1, 32, scales, fault)
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint8 \[4, 96\]"):
        kernel.fp8_codes_exact(bits, 2, 32, scales, np.zeros((4, 48), np.uint8), fault)
