"""E8M0, enumerated: every scale byte, against ml_dtypes; nothing but powers of two goes in."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from dsv4_quant.formats import e8m0

NUMBERS = np.arange(255, dtype=np.uint8)


def test_every_byte_decodes_as_in_ml_dtypes() -> None:
    assert e8m0.VALUES.dtype == np.float32
    theirs = NUMBERS.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert e8m0.VALUES[:255].tobytes() == theirs.tobytes()
    assert np.isnan(e8m0.VALUES[e8m0.NAN]) and e8m0.NAN == 255


def test_every_byte_is_its_power_of_two() -> None:
    for byte in NUMBERS.tolist():
        assert Fraction(float(e8m0.VALUES[byte])) == Fraction(2) ** (byte - e8m0.BIAS)


def test_every_byte_encodes_to_itself() -> None:
    assert e8m0.is_power_of_two(e8m0.VALUES[:255]).all()
    assert np.array_equal(e8m0.encode(e8m0.VALUES[:255]), NUMBERS)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, -1.0, 3.0, 0.75, np.nan, np.inf, -np.inf, 2.0**-128, 1e-45]
)
def test_anything_else_is_refused(value: float) -> None:
    array = np.array([1.0, value], np.float32)
    assert e8m0.is_power_of_two(array).tolist() == [True, False]
    with pytest.raises(ValueError, match="power of two"):
        e8m0.encode(array)


def test_neighbours_of_powers_of_two_are_none() -> None:
    values = e8m0.VALUES[1:255]
    for towards in (0, np.inf):
        assert not e8m0.is_power_of_two(np.nextafter(values, np.float32(towards))).any()
