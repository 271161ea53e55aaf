"""FP8 E4M3FN, enumerated: 256 codes, every midpoint, both signs, against ml_dtypes and torch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.formats import e4m3

ALL_CODES = np.arange(256, dtype=np.uint8)
FINITE = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
MAGNITUDES = e4m3.VALUES[:0x7F].astype(np.float64)
MIDPOINTS = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)


def ml_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_every_code_decodes_as_in_ml_dtypes_and_torch() -> None:
    ours = e4m3.VALUES
    assert ours.dtype == np.float32 and ours.shape == (256,)
    theirs = FINITE.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert ours[FINITE].tobytes() == theirs.tobytes()
    of_torch = torch.from_numpy(FINITE.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert ours[FINITE].tobytes() == of_torch.tobytes()
    assert np.flatnonzero(np.isnan(ours)).tolist() == list(e4m3.NAN_CODES)
    assert np.nanmax(ours) == e4m3.MAX


def test_every_code_encodes_to_itself() -> None:
    assert np.array_equal(e4m3.encode(e4m3.VALUES[FINITE]), FINITE)


@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_go_to_the_even_code(sign: int) -> None:
    codes = e4m3.encode(sign * MIDPOINTS)
    assert not (codes & 1).any()
    assert np.array_equal(codes, ml_bits(sign * MIDPOINTS))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("towards", [0.0, 1000.0])
def test_next_to_a_midpoint_the_nearer_code_wins(sign: int, towards: float) -> None:
    values = sign * np.nextafter(MIDPOINTS, np.float32(towards))
    codes = e4m3.encode(values)
    assert np.array_equal(codes & 0x7F, np.arange(126) + (towards > 0))
    assert np.array_equal(codes, ml_bits(values))


def test_saturates_where_the_reference_would_make_nan() -> None:
    values = np.array([448, 463.9, 464, 1e38, np.inf], np.float32)
    assert e4m3.encode(values).tolist() == [0x7E] * 5
    assert e4m3.encode(-values).tolist() == [0xFE] * 5
    assert ml_bits(values).tolist() == [0x7E, 0x7E, 0x7E, 0x7F, 0x7F]  # 464 ties to even, still


def test_signed_zeros_and_nan() -> None:
    values = np.array([0.0, -0.0, 1e-45, -1e-45, np.nan, -np.nan], np.float32)
    assert e4m3.encode(values).tolist() == [0, 0x80, 0, 0x80, 0x7F, 0x7F]


@given(st.lists(st.floats(-448, 448, width=32), max_size=50))
def test_encode_rounds_as_ml_dtypes(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert np.array_equal(e4m3.encode(array), ml_bits(array))
