"""The candidates of a scale rule: how many there are, and that no other exponent can win."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.rules import FP8_LOSING, ZERO_EXPONENTS, ScaleRule, candidates

GRIDS = {
    "fp4": [Fraction(float(v)) for v in e2m1.VALUES[:8]],
    "fp8": [Fraction(float(v)) for v in e4m3.VALUES[: e4m3.NAN_CODES[0]]],
}


def error(values: list[Fraction], element: str, exponent: int) -> Fraction:
    """Sum of squared distances to the nearest point of the grid, exactly."""
    scale = Fraction(2) ** exponent
    return sum(
        (min(abs(v - point * scale) for point in GRIDS[element]) ** 2 for v in values), Fraction(0)
    )


def test_counts() -> None:
    assert [candidates(ScaleRule.MAX, e, 32) for e in ("fp4", "fp8")] == [1, 1]
    assert candidates(ScaleRule.LEAST_SQUARES, "fp8", 128 * 128) == 2
    counts = [candidates(ScaleRule.LEAST_SQUARES, "fp4", n) for n in (1, 32, 37, 38, 82, 83, 512)]
    assert counts == [2, 2, 2, 3, 3, 4, 4]


def test_zero_exponents_are_the_published_floors() -> None:
    for element, floor in (("fp4", Fraction(6, 2**126)), ("fp8", Fraction(1, 10**4))):
        top, s = GRIDS[element][-1], ZERO_EXPONENTS[element]
        assert top * Fraction(2) ** (s - 1) < floor <= top * Fraction(2) ** s


# The worst that the proofs allow: a largest value that is barely too large for the next exponent,
# and others that lie midway between two points of the coarser grid and on the finer one.
FP4_WORST = [Fraction(3) + Fraction(1, 2**20)] + [Fraction(1, 4)] * 31
FP8_WORST = [Fraction(225)] + [Fraction(1, 2**10)] * 63


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 64), min_size=31, max_size=31), st.integers(385, 768))
@example([16] * 31, 385)
@example([8] * 31, 385)
@example([9] * 31, 386)
def test_fp4_blocks_of_32_need_two(others: list[int], largest: int) -> None:
    """In units of 2**s_max: 3 < largest <= 6, and any others in steps of 1/64 up to 1."""
    values = [Fraction(largest, 128)] + [Fraction(v, 64) for v in others]
    best = min(error(values, "fp4", k) for k in (0, -1))
    assert all(best <= error(values, "fp4", k) for k in (1, 2, -2, -3, -4))


@pytest.mark.parametrize(("element", "worst"), [("fp4", FP4_WORST), ("fp8", FP8_WORST)])
def test_the_worst_blocks(element: str, worst: list[Fraction]) -> None:
    errors = {k: error(worst, element, k) for k in range(-6, 3)}
    assert errors[-1] < errors[0] <= min(errors[1], errors[2])
    assert errors[0] < min(errors[k] for k in range(-6, -1))


@pytest.mark.parametrize("largest", [FP8_LOSING, 241, 247, 248, 249, 256, 271, 272, 300, 448])
def test_fp8_blocks_that_cannot_gain(largest: float) -> None:
    """Even 4096 other values that s_max flushes or doubles, and s_max - 1 holds exactly."""
    gain = 4096 * error([Fraction(1, 2**10)], "fp8", 0)
    a = [Fraction(largest)]
    assert error([Fraction(1, 2**10)], "fp8", -1) == 0
    assert error(a, "fp8", 0) + gain < error(a, "fp8", -1)
