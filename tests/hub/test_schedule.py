"""Visits and room: every read is served in time, and the room is enough for any timing."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.hub.schedule import (
    BLOCK,
    HOLE_BYTES,
    Range,
    Visit,
    merge,
    room,
    visits,
    without,
)

MIB = 1 << 20


def spans_in(limit: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    pair = st.tuples(st.integers(0, limit), st.integers(0, limit))
    return st.lists(pair.map(lambda p: (min(p), max(p))).filter(lambda p: p[0] < p[1]), max_size=8)


def points(spans: list[tuple[int, int]]) -> set[int]:
    return {at for start, stop in spans for at in range(start, stop)}


@given(spans_in(60), spans_in(60))
def test_spans_are_sets_of_bytes(
    spans: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    joined = merge(spans)
    assert points(joined) == points(spans)
    assert all(b < c for (_, b), (c, _) in pairwise(joined))
    assert points(list(without(joined, others))) == points(spans) - points(others)


def test_near_spans_are_joined() -> None:
    assert merge([(10, 20), (0, 5)], hole=5) == [(0, 20)]
    assert merge([(10, 20), (0, 5)], hole=4) == [(0, 5), (10, 20)]


def two_phases(files: int = 6, small: int = MIB, large: int = 20 * MIB) -> list[list[Range]]:
    """A small range of every file, then the large rest of each: an mp conversion in short."""
    names = [f"{n}" for n in range(files)]
    first = [[Range(name, 100, 100 + small)] for name in names]
    return first + [[Range(name, 2 * MIB, 2 * MIB + large)] for name in names]


def test_small_early_reads_are_ranges_and_the_largest_visit_is_whole() -> None:
    sizes = dict.fromkeys("012345", 22 * MIB)
    found = visits(two_phases(), sizes)
    early = [Visit(f"{n}", n, n, ((100, 100 + MIB),), False) for n in range(6)]
    # the last file's small range is read just before the first file's rest: gaps decide
    whole = [Visit(f"{n}", n + 6, n + 6, ((0, 22 * MIB),), True) for n in range(6)]
    assert list(found) == early + whole
    assert early[0].nbytes == MIB + BLOCK


def test_reads_with_little_between_them_are_one_visit() -> None:
    sizes = {"a": 16 * MIB, "b": 16 * MIB}
    near = [[Range("a", 0, MIB)], [Range("b", 0, MIB)], [Range("a", MIB, 2 * MIB)]]
    assert [v.file for v in visits(near, sizes)] == ["a", "b"]
    far = [[Range("a", 0, MIB)], [Range("b", 0, MIB + 1)], [Range("a", MIB, 3 * MIB)]]
    assert [(v.file, v.is_whole) for v in visits(far, sizes)] == [
        ("a", False), ("b", True), ("a", True)
    ]  # fmt: skip


def test_a_file_that_nobody_reads_is_checked_first() -> None:
    found = visits([[Range("b", 8, 100)]], {"a": 8, "b": 100})
    assert found == (Visit("a", 0, 0, ((0, 8),), True), Visit("b", 0, 0, ((0, 100),), True))


def test_a_visit_knows_what_it_covers() -> None:
    visit = Visit("a", 0, 0, ((10, 20), (30, 40)), False)
    inside = [(10, 20), (12, 13), (30, 31), (39, 40)]
    outside = [(9, 11), (19, 31), (20, 21), (15, 35), (0, 5), (40, 41), (39, 41)]
    assert all(visit.covers(*span) for span in inside)
    assert not any(visit.covers(*span) for span in outside)


@st.composite
def reads_of_files(draw: st.DrawFn) -> tuple[list[list[Range]], dict[str, int]]:
    sizes = {
        name: draw(st.integers(1, 40)) * HOLE_BYTES for name in "abcd"[: draw(st.integers(1, 4))]
    }
    one = st.sampled_from(sorted(sizes)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.integers(0, sizes[name] - 1), st.integers(1, sizes[name])
        )
    )
    ranges = one.map(lambda r: Range(r[0], r[1], min(r[1] + r[2], sizes[r[0]])))
    return draw(st.lists(st.lists(ranges, min_size=1, max_size=3), min_size=1, max_size=25)), sizes


@given(reads_of_files())
def test_every_read_has_its_visit_and_every_file_one_whole(
    case: tuple[list[list[Range]], dict[str, int]],
) -> None:
    reads, sizes = case
    found = visits(reads, sizes)
    for step, ranges in enumerate(reads):
        for one in ranges:
            assert any(
                v.file == one.file and v.first <= step <= v.last and v.covers(one.start, one.stop)
                for v in found
            )
    for name, size in sizes.items():
        assert [v.spans for v in found if v.file == name and v.is_whole] == [((0, size),)]
        own = [v for v in found if v.file == name]
        assert all(a.last < b.first for a, b in pairwise(own))
    assert list(found) == sorted(found, key=lambda v: (v.first, v.file))


@settings(max_examples=200)
@given(reads_of_files(), st.randoms(use_true_random=False), st.integers(1, 8))
def test_the_room_is_enough_whatever_happens_when(
    case: tuple[list[list[Range]], dict[str, int]], chance: random.Random, every: int
) -> None:
    """A run with any delays: visits are admitted in order and arrive later, steps wait for them,
    cuts come late, and what has served goes with the cut, or when it arrives."""
    reads, sizes = case
    found = visits(reads, sizes)
    cuts = [*range(every, len(reads), every), len(reads)]
    limit = room(found, cuts)
    done = cut = admitted = 0
    coming: set[int] = set()
    here: set[int] = set()
    while cut < len(reads):
        held = sum(found[i].nbytes for i in here | coming)
        assert held <= limit
        moves = ["arrive"] if coming else []
        if admitted < len(found) and held + found[admitted].nbytes <= limit:
            moves.append("admit")
        needed = {i for i, visit in enumerate(found) if visit.first <= done <= visit.last}
        if done < len(reads) and needed <= here:
            moves.append("step")
        if any(cut < c <= done for c in cuts):
            moves.append("cut")
        assert moves, "nothing can go on"
        move = chance.choice(moves)
        if move == "admit":
            coming.add(admitted)
            admitted += 1
        elif move == "arrive":
            arrived = chance.choice(sorted(coming))
            coming.remove(arrived)
            here.add(arrived)
        elif move == "step":
            done += 1
        else:
            cut = next(c for c in cuts if c > cut)
        here -= {i for i in here if found[i].last < cut}


def test_the_room_of_an_mp_conversion_is_three_files() -> None:
    files, large = 40, 20 * MIB
    sizes = {f"{n}": large + 2 * MIB for n in range(files)}
    found = visits(two_phases(files, MIB // 4, large), sizes)
    cuts = range(1, 2 * files + 1)
    assert room(found, cuts) < 3.2 * sizes["0"]
    assert room(found, [2 * files]) > files * sizes["0"], "without cuts nothing can be given back"


@pytest.mark.parametrize("cuts", [[1], [1, 2]])
def test_the_least_room_is_that_of_the_largest_file_twice(cuts: list[int]) -> None:
    found = visits([[Range("a", 0, 5 * BLOCK)]], {"a": 5 * BLOCK})
    assert room(found, cuts) == 2 * 5 * BLOCK + 2 * BLOCK
