"""FP4, enumerated: 16 codes, 256 bytes, every midpoint, both signs, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.formats import e2m1

ALL_CODES = np.arange(16, dtype=np.uint8)
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def ml_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def test_every_code_decodes_as_in_ml_dtypes() -> None:
    theirs = ALL_CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert e2m1.VALUES.dtype == np.float32
    assert e2m1.VALUES.tobytes() == theirs.tobytes()  # as bytes: -0 is code 8


def test_every_code_encodes_to_itself() -> None:
    assert np.array_equal(e2m1.encode(e2m1.VALUES), ALL_CODES)


@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_go_to_the_even_code(sign: int) -> None:
    codes = e2m1.encode(sign * MIDPOINTS)
    assert codes.tolist() == [(c | (8 if sign < 0 else 0)) for c in (0, 2, 2, 4, 4, 6, 6)]
    assert np.array_equal(codes, ml_bits(sign * MIDPOINTS))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("towards", [0.0, 10.0])
def test_next_to_a_midpoint_the_nearer_code_wins(sign: int, towards: float) -> None:
    values = sign * np.nextafter(MIDPOINTS, np.float32(towards))
    codes = e2m1.encode(values)
    assert np.array_equal(codes & 7, np.arange(7) + (towards > 0))
    assert np.array_equal(codes, ml_bits(values))


def test_saturates_and_keeps_the_sign() -> None:
    tiny = np.float32(1e-45)
    values = np.array([5.1, 6.0, 6.1, 1e38, np.inf, 0.0, tiny], np.float32)
    assert e2m1.encode(values).tolist() == [7, 7, 7, 7, 7, 0, 0]
    assert e2m1.encode(-values).tolist() == [15, 15, 15, 15, 15, 8, 8]
    assert e2m1.VALUES[7] == e2m1.MAX


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        e2m1.encode(np.array([1.0, np.nan], np.float32))


@given(st.lists(st.floats(-8, 8, width=32), max_size=50))
def test_encode_rounds_as_ml_dtypes(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert np.array_equal(e2m1.encode(array), ml_bits(array))


def test_every_byte_unpacks_low_nibble_first_and_packs_back() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    codes = e2m1.unpack(packed)
    assert codes.shape == (16, 32) and codes.dtype == np.uint8
    assert np.array_equal(codes[:, 0::2], packed % 16)
    assert np.array_equal(codes[:, 1::2], packed // 16)
    assert np.array_equal(e2m1.pack(codes), packed)


def test_shapes_of_other_ranks_and_strides() -> None:
    assert e2m1.unpack(np.empty((3, 0), np.uint8)).shape == (3, 0)
    assert e2m1.unpack(np.array([0x21], np.uint8)).tolist() == [1, 2]
    cube = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(e2m1.unpack(cube[..., ::2]), e2m1.unpack(cube[..., ::2].copy()))
    assert np.array_equal(e2m1.pack(e2m1.unpack(cube)), cube)
