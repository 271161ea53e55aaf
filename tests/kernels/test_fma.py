"""fma, against whole numbers and fractions."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_quant.kernels.fma_torch import fma


def bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def rounded(exact: Fraction) -> float:
    """The nearest float32, ties to even, in whole numbers; too large is infinite."""
    size, exponent = abs(exact), -149
    while size >= Fraction(2) ** (exponent + 24):
        exponent += 1
    units, rest = divmod(size / Fraction(2) ** exponent, 1)
    units += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and units % 2)
    value = float(units * Fraction(2) ** exponent)  # float64 holds all of these
    return (-1 if exact < 0 else 1) * (value if value < 2.0**128 else np.inf)


def single(values: tuple[float, float, float]) -> float:
    return float(fma(*(torch.tensor(value, dtype=torch.float32) for value in values)))


ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def close(draw: st.DrawFn) -> tuple[float, float, float]:
    """c is about as large as a * b, or up to 2**60 times larger or smaller."""

    def number(exponent: int) -> float:
        digits = draw(st.integers(1 << 23, (1 << 24) - 1) | st.sampled_from([1 << 23, 0xFFFFFF]))
        sign = draw(st.sampled_from([1, -1]))
        return float(np.float32(sign * np.ldexp(float(digits), exponent - 23)))

    first, second = draw(st.integers(-70, 50)), draw(st.integers(-70, 50))
    apart = draw(st.integers(-60, 60) | st.sampled_from([-25, -24, -23, 0, 23, 24, 25, 48]))
    return number(first), number(second), number(min(max(first + second + apart, -148), 127))


STEP = 2.0**-23
HALF = (1 + STEP) * 2.0**-12, (1 - STEP) * 2.0**-12, 1 + STEP
"""Just below half-way between two float32. In float64 it rounds to half-way, and then up."""


@settings(max_examples=500, deadline=None)
@example(HALF)
@example((-HALF[0], HALF[1], -HALF[2]))
@example((2.0**-75, 2.0**-75, 2.0**-149))  # half of the smallest number, twice over
@example((2.0**-75 * (1 + STEP), 2.0**-75, 0.0))
@example((2.0**-75, 2.0**-76 * (1 + STEP), 2.0**-126))
@example((2.0**64, 2.0**64 * (1 - STEP / 2), 2.0**103))  # at the edge of infinity
@example((2.0**64, 2.0**64 * (1 - STEP / 2), 2.0**102))
@given(close() | st.tuples(ANY, ANY, ANY))
def test_rounded_once(values: tuple[float, float, float]) -> None:
    a, b, c = map(Fraction, values)
    if a * b + c:  # the sign of an exact zero is in the table below
        assert bits(single(values)) == bits(rounded(a * b + c)), [value.hex() for value in values]


def test_rounding_twice_would_be_noticed() -> None:
    a, b, c = HALF
    twice = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    assert twice != rounded(Fraction(a) * Fraction(b) + Fraction(c)) == single(HALF)


def test_zeros_infinities_and_nan() -> None:
    inf, nan, tiny = np.inf, np.nan, 2.0**-149
    for a, b, c, expected in [
        (0.0, 1.0, 0.0, 0.0), (-0.0, 1.0, 0.0, 0.0), (-0.0, 1.0, -0.0, -0.0), (1, 1, -1, 0.0),
        (-tiny, tiny, 0.0, -0.0), (-tiny, tiny, -0.0, -0.0), (tiny, tiny, -0.0, 0.0),
        (inf, 2, 1, inf), (inf, -2, 1, -inf), (1, 1, -inf, -inf), (3e38, 3e38, -3e38, inf),
        (3e38, 3e38, -inf, -inf),
    ]:  # fmt: skip
        assert bits(single((a, b, c))) == bits(expected), (a, b, c)
    for values in [(inf, 0, 1), (inf, 1, -inf), (nan, 1, 1), (1, nan, 1), (1, 1, nan)]:
        assert np.isnan(single(values)), values


def test_shapes_broadcast() -> None:
    a, b, c = torch.ones(3, 1, 4), torch.ones(2, 4), torch.zeros(1)
    assert fma(a, b, c).shape == (3, 2, 4) and fma(a, b, c).dtype == torch.float32
