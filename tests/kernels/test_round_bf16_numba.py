"""float32 to BF16 by rounding: ml_dtypes says what is nearest, the definition's fold the sums."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsv4_quant.formats import bf16
from dsv4_quant.formats.cost import Cost
from dsv4_quant.kernels.blocks_torch import fold_sum
from dsv4_quant.kernels.figures import Figures, cost
from dsv4_quant.kernels.jit_numba import NAN
from dsv4_quant.kernels.round_bf16_numba import round_bf16

Floats = NDArray[np.float32]
LARGEST = np.uint32(0x7F7F7FFF).view(np.float32)
"""The largest float32 that rounds to a finite BF16."""


def rounded(values: NDArray[Any], panel: int = 1 << 20) -> tuple[NDArray[np.uint16], Cost]:
    """A weight in panels of some rows."""
    out = np.full(values.shape, 0xAAAA, np.uint16)
    figures, result = [], np.full(3, -1)
    for row in range(0, len(values), panel):
        rows = values[row : row + panel]
        figures.append(Figures.empty(len(rows)))
        assert round_bf16(rows, out[row : row + panel], figures[-1], result) == 0
    assert result.tolist() == [-1, -1, -1]
    return out, cost(figures)


def check(values: Floats, panel: int = 1 << 20) -> Cost:
    out, found = rounded(values, panel)
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out, expected.view(np.uint16))
    errors = values.astype(np.float64) - expected.astype(np.float64)
    sums = []
    for x in (values.astype(np.float64), errors):
        total = 0.0
        for row in fold_sum(torch.from_numpy(x).square()).tolist():
            total += row
        sums.append(total)
    assert found == Cost(
        values=values.size,
        value_squares=sums[0],
        error_squares=sums[1],
        largest_error=np.abs(errors).max(),
        flushed=int(((values != 0) & (expected == 0)).sum()),
        blocks=len(values),
        exact_blocks=int((errors == 0).all(1).sum()),
    )
    return found


def test_every_bf16_its_midpoints_and_what_is_beside_them() -> None:
    bits = np.arange(0x7F7F, dtype=np.uint32)[:, None] << 16
    bits = (bits + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(257, -1)
    found = check((bits | np.uint32(0x80000000)).view(np.float32))
    assert check(bits.view(np.float32)) == found
    assert found.flushed == 3 and found.exact_blocks == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(-149, 100), st.integers(1, 4), st.data())
def test_any_panel(rows: int, cols: int, exponent: int, panel: int, data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = (draw.standard_normal((rows, cols)) * 2.0**exponent).astype(np.float32)
    exact = draw.random(rows) < 0.3
    values[exact] = bf16.decode((values[exact].view(np.uint32) >> 16).astype(np.uint16))
    assert check(values, panel) == check(values)


def test_bf16_stays_what_it_is() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80].reshape(-1, 128)
    out, found = rounded(bits)
    np.testing.assert_array_equal(out, bits)
    assert found == check(bf16.decode(bits)) and found.exact_blocks == found.blocks == len(bits)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, np.nextafter(LARGEST, np.inf), -3.4e38])
def test_what_has_no_nearest_is_named(bad: float) -> None:
    values = np.full((3, 40), LARGEST)
    out, result = np.empty((3, 40), np.uint16), np.zeros(3, np.int64)
    assert round_bf16(values, out, None, result) == 0
    assert (out == 0x7F7F).all()
    values[1, 33] = values[1, 35] = values[2, 0] = bad
    assert round_bf16(values, out, Figures.empty(3), result) == NAN
    assert result.tolist() == [1, 33, values.view(np.uint32)[1, 33]]
    every_nan = np.uint32(0x7FFFFFFF).view(np.float32)
    assert round_bf16(np.full((3, 40), every_nan), out, None, result) == NAN


def test_wrong_operands_are_refused() -> None:
    values, result = np.zeros((2, 3), np.float32), np.zeros(3, np.int64)
    with pytest.raises(ValueError, match=r"out must be a C-contiguous uint16 \[2, 3\]"):
        round_bf16(values, np.zeros((3, 2), np.uint16), None, result)
    with pytest.raises(ValueError, match="values must be a C-contiguous float32"):
        round_bf16(values.astype(np.int32), np.zeros((2, 3), np.uint16), None, result)
    assert round_bf16(values[:0], np.zeros((0, 3), np.uint16), Figures.empty(0), result) == 0
