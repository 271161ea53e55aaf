"""Digests, recomputed from their definition with nothing but numpy and blake3."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv4_quant.fingerprints.sketch import (
    BUCKETS,
    CHUNK,
    ROW_BYTES,
    SEED,
    Digest,
    Digester,
    digest,
    distance,
    row_hashes,
)


def by_definition(rows: np.ndarray) -> Digest:
    stream = np.random.PCG64(SEED)
    sums = [0.0] * BUCKETS
    for row in rows:
        words = [int(stream.random_raw()) for _ in range(math.ceil(len(row) / 64))]
        for i, value in enumerate(row):
            sign = -1 if words[i // 64] >> (i % 64) & 1 else 1
            sums[i % BUCKETS] += sign * float(value)
    norm = math.sqrt(sum(float(value) ** 2 for value in rows.reshape(-1)))
    return Digest(blake3(rows.astype("<f4").tobytes()).hexdigest()[:32], norm, tuple(sums))


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=140),
        elements=st.floats(-100, 100, width=32),
    )
)
def test_a_stranger_gets_the_same(rows: np.ndarray) -> None:
    mine, theirs = digest(rows), by_definition(rows)
    assert mine.hash == theirs.hash
    assert mine.norm == pytest.approx(theirs.norm, rel=1e-7, abs=1e-30)
    assert mine.sketch == pytest.approx(theirs.sketch, rel=1e-7, abs=1e-4)


def test_more_rows_than_are_worked_on_at_a_time() -> None:
    rows = np.random.default_rng(0).standard_normal((3 + CHUNK // 4096, 4096), np.float32)
    halves = [digest(rows[: len(rows) // 2]), digest(rows)]
    assert halves[0].norm < halves[1].norm == pytest.approx(np.linalg.norm(rows), rel=1e-6)


@pytest.mark.parametrize("cuts", [(0, 9), (1, 2, 3, 9), (4, 4, 9)])
def test_rows_may_come_in_pieces(cuts: tuple[int, ...]) -> None:
    rows = np.random.default_rng(3).standard_normal((9, 70), np.float32)
    digester = Digester(70)
    for start, stop in pairwise((0, *cuts)):
        digester.add(rows[start:stop])
    assert digester.digest() == digest(rows)


def test_numbers_have_eight_digits() -> None:
    made = digest(np.random.default_rng(1).standard_normal((5, 70), np.float32))
    assert all(float(f"{value:.8g}") == value for value in (made.norm, *made.sketch))


def test_the_distance_is_right_on_average() -> None:
    """Its square is the squared distance times a chi-square of BUCKETS degrees, over BUCKETS."""
    draw = np.random.default_rng(2)
    ratios = []
    for _ in range(400):
        one = draw.standard_normal((6, 200), np.float32)
        other = one + 1e-3 * draw.standard_normal(one.shape, np.float32)
        exact = np.linalg.norm(other - one) / np.linalg.norm(one)
        ratios.append((distance([digest(one)], [digest(other)]) / exact) ** 2)
    assert np.mean(ratios) == pytest.approx(1, abs=4 * math.sqrt(2 / BUCKETS / 400))
    assert np.std(ratios) == pytest.approx(math.sqrt(2 / BUCKETS), rel=0.25)


def test_no_distance_to_itself_and_none_to_nothing() -> None:
    zero = digest(np.zeros((2, 8), np.float32))
    assert distance([zero], [zero]) == 0
    one = digest(np.ones((2, 8), np.float32))
    assert distance([one], [one]) == 0 < distance([zero], [one])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows_in_the_norm(bad: float) -> None:
    rows = np.ones((3, 100), np.float32)
    rows[1, 7] = bad
    assert not math.isfinite(digest(rows).norm)


def test_a_row_that_changes_changes_its_hash_alone() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    before = row_hashes(rows)
    assert len(before) == 3 * ROW_BYTES
    assert before[:ROW_BYTES] == blake3(rows[0].tobytes()).digest()[:ROW_BYTES]
    rows[1, 2] = np.nextafter(rows[1, 2], np.float32(9))
    after = row_hashes(rows)
    assert [before[i : i + 2] == after[i : i + 2] for i in (0, 2, 4)] == [True, False, True]
