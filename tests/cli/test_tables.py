"""Tables, sizes, durations."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.cli.tables import duration, filled, size, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (159_609_485_896, "149 GiB"),
        (864_704_792_696, "805 GiB"),
        (1_602_325_824_632, "1.46 TiB"),
        (5 << 50, "5120 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@given(st.integers(1, 1 << 49))
def test_size_has_three_digits_and_is_right(count: int) -> None:
    number, unit = size(count).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert abs(float(number) * factor - count) <= count * 0.006
    if unit != "B":
        assert len(re.sub(r"^0?\.|\.", "", number)) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_columns_are_aligned() -> None:
    text = table(["name", "count"], [["a", "1"], ["longer", "12,345"]], "<>")
    assert text == "name     count\na            1\nlonger  12,345"


@pytest.mark.parametrize("columns", [30, 40, 79])
def test_a_wide_table_gives_up_text_and_no_number(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = table(["tensor", "n"], [["layers.0.attn." * 9, "123,456,789"]], "<>")
    assert all(len(line) <= columns for line in text.split("\n"))
    assert "123,456,789" in text and "…" in text


def test_a_terminal_that_is_too_narrow_keeps_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    assert "123,456,789" in table(["tensor", "n"], [["layers.0.attn", "123,456,789"]], "<>")


def test_text_takes_as_many_lines_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "layers.0.ffn.experts.12.w1.weight-of-a-very-long-name-indeed"
    for columns, width in ((10, 40), (60, 60), (300, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        first, *others = filled(f"{'many words ' * 12}{name}", "- key  ").split("\n")
        assert first.startswith("- key  many") and others
        assert all(line.startswith("       ") and line[7] != " " for line in others)
        assert all(len(line) <= width or line.strip() == name for line in (first, *others))
        assert name in others[-1]
