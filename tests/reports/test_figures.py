"""Numbers as text: never nothing where there is something, never all where some is missing."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.formats.cost import Cost
from dsv4_quant.reports.figures import (
    decibels,
    magnitude,
    part,
    percent,
    relative_error,
    short,
    size,
)
from dsv4_quant.reports.scales import Axis, ticks


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"), (1e-9, "<0.001%"), (1e-5, "0.001%"), (0.00552, "0.552%"), (0.0123, "1.23%"),
        (0.09996, "10.0%"), (0.118, "11.8%"), (0.9994, "99.9%"), (0.99951, ">99.9%"),
        (1 - 1e-12, ">99.9%"), (1.0, "100%"), (2.5, "250%"), (math.inf, "inf"), (math.nan, "NaN"),
    ],
)  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@given(st.floats(0, 1))
def test_percent_is_right(share: float) -> None:
    text = percent(share)
    assert (text == "0%") == (share == 0) and (text == "100%") == (share == 1)
    if text[0] not in "<>":
        assert float(text[:-1]) == pytest.approx(100 * share, rel=0.006, abs=0.00051)


@given(st.integers(0, 10**15 - 10**12))
def test_short_fits_five_characters_and_is_right(count: int) -> None:
    text = short(count)
    assert len(text) <= 5
    number = float(text.rstrip("kMGT")) * 1000 ** " kMGT".index(
        text[-1] if text[-1] in "kMGT" else " "
    )
    assert number == pytest.approx(count, rel=0.0051)


@given(st.integers(0, 2**55))
def test_size_is_right(count: int) -> None:
    number, unit = size(count).split()
    factor = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
    assert float(number) * factor == pytest.approx(count, rel=0.0051)


def test_magnitude_and_decibels() -> None:
    assert [magnitude(v) for v in (0.0, 0.05, 1.234e-5, 188.2, 12345.6, 3e6)] == [
        "0", "0.0500", "1.23e-05", "188", "12,346", "3.00e+06",
    ]  # fmt: skip
    assert [decibels(v) for v in (19.314, math.inf, -math.inf, math.nan)] == [
        "19.31", "exact", "-inf", "NaN",
    ]  # fmt: skip


def test_relative_error_is_sqnr_in_other_words() -> None:
    cost = Cost(value_squares=3.0, error_squares=0.02)
    assert relative_error(cost) == pytest.approx(10 ** (-cost.sqnr / 20))
    assert relative_error(Cost(value_squares=3.0)) == 0
    assert relative_error(Cost(error_squares=1.0)) == math.inf
    assert part(1, 0) == 0 and part(1, 4) == 0.25


@given(st.floats(-200, 1e9), st.floats(0, 1e9), st.integers(2, 30))
def test_ticks_lie_within_and_are_few_and_even(low: float, length: float, count: int) -> None:
    marks = ticks(low, low + length, count)
    assert len(marks) <= count + 1
    assert all(low <= mark <= low + length for mark in marks)
    assert len({b - a for a, b in pairwise(marks)}) <= 1


def test_axis_stays_within() -> None:
    assert [Axis(10, 20, 100).at(v) for v in (5, 10, 15, 20, 99)] == [0, 0, 50, 100, 100]
    assert Axis(3, 3, 100).at(3) == 0
