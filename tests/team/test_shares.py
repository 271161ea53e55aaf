"""Nothing is lost, nothing done twice, and nobody does much more than the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.team.shares import runs, shares

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 1 << 40), max_size=40)
COUNTS = st.integers(1, 9)


@given(SIZES, COUNTS)
def test_shares(sizes: dict[str, int], count: int) -> None:
    found = shares(sizes, count)
    assert len(found) == count
    assert sorted(key for keys in found for key in keys) == sorted(sizes)
    order = {key: place for place, key in enumerate(sizes)}
    assert all(keys == sorted(keys, key=order.__getitem__) for keys in found)
    loads = [sum(sizes[key] for key in keys) for keys in found]
    fullest = max(found, key=lambda keys: sum(sizes[key] for key in keys))
    least = min((sizes[key] for key in fullest), default=0)
    assert max(loads) - least <= min(loads), "its last could not go to a better place"


@given(SIZES, COUNTS)
def test_runs(sizes: dict[str, int], count: int) -> None:
    found = runs(sizes, count)
    assert len(found) == count and [key for keys in found for key in keys] == list(sizes)
    fair = sum(sizes.values()) / count
    largest = max(sizes.values(), default=0)
    assert all(sum(sizes[key] for key in keys) <= fair + largest + 1 for keys in found)


def test_few_files() -> None:
    assert shares({"a": 5, "b": 5, "c": 5, "d": 5}, 2) == [["a", "c"], ["b", "d"]]
    assert shares({"a": 1, "b": 9, "c": 4, "d": 4}, 2) == [["b"], ["a", "c", "d"]]
    assert shares({"a": 1}, 3) == [["a"], [], []]
