"""The plot: well-formed, to scale, and nothing outside of it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.plot import COLOURS, HEIGHT, WIDTH, Line, Panel, svg, ticks
from benchmarks.rows import Row
from benchmarks.scaling import plot

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("largest", "marks"),
    [
        (10, [0, 2, 4, 6, 8, 10]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (18.9, [0, 5, 10, 15, 20]),
        (310, [0, 50, 100, 150, 200, 250, 300, 350]),
        (0, [0, 1]),
    ],
)
def test_ticks(largest: float, marks: list[float]) -> None:
    assert ticks(largest) == marks


@given(st.floats(1e-6, 1e12))
def test_ticks_reach_every_value_in_a_few_even_steps(largest: float) -> None:
    marks = ticks(largest)
    assert 4 <= len(marks) <= 9 and marks[0] == 0
    assert marks[-2] < largest * (1 + 1e-6) and largest <= marks[-1] * (1 + 1e-6)


def circles(text: str) -> list[list[tuple[float, float]]]:
    """Centres per panel."""
    panels = ElementTree.fromstring(text).findall(f"{SVG}g")
    return [
        [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in panel.findall(f"{SVG}circle")]
        for panel in panels
    ]


def test_points_stand_where_their_values_say() -> None:
    lines = [Line("a & b", [(0, 0), (5, 50), (10, 100)]), Line("<c>", [(0, 100), (10, 0)])]
    text = svg([Panel("t", "x", "y", lines)])
    [[zero, half, full, top, right]] = circles(text)
    assert half == ((zero[0] + full[0]) / 2, (zero[1] + full[1]) / 2)
    assert top == (zero[0], full[1]) and right == (full[0], zero[1])
    assert 0 < zero[0] < full[0] < WIDTH and 0 < full[1] < zero[1] < HEIGHT
    legend = [one.text for one in ElementTree.fromstring(text).findall(f"{SVG}text")]
    assert legend == ["a & b", "<c>"]


def test_scaling_is_drawn_as_measured() -> None:
    """Twice the bytes in twice the time is a line through zero; equal peaks lie level."""
    rows = [
        Row(job, f"{threads}, {size} GB source", factor * size, 1.0, 300 << 20, size * 10**9)
        for job, factor in (("reshard", 1.0), ("FP8", 2.0))
        for size in (1, 2, 4)
        for threads in ("1 thread", "2 threads")
    ]
    text = plot(rows)
    time, memory = circles(text)
    assert len(time) == len(memory) == 12 and len({y for _, y in memory}) == 1
    slopes = {
        round((later[1] - first[1]) / (later[0] - first[0]), 2)
        for first, later in (
            *zip(time[0::3], time[1::3], strict=True),
            *zip(time[1::3], time[2::3], strict=True),
        )
    }
    assert len(slopes) == 2
    drawn = re.findall(r'fill="none" stroke="(#\w+)"', text)
    assert drawn == [*COLOURS[:4], *COLOURS[:4]]
    for name in ("reshard, 1 thread", "reshard, 2 threads", "FP8, 1 thread", "FP8, 2 threads"):
        assert text.count(f">{name}<") == 1
