"""Lines behind their hashes: all of them come back, and nothing that is torn or changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.durable import hashed_line, sync_folder, whole_lines

VALUES = st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers()))


@given(st.lists(VALUES, max_size=5))
def test_there_and_back(values: list[dict[str, object]]) -> None:
    lines = [hashed_line(value) for value in values]
    assert list(whole_lines(b"".join(lines))) == list(zip(values, lines, strict=True))


@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_what_is_torn_ends_it(values: list[dict[str, object]], data: st.DataObject) -> None:
    """Of the last line the newline may be missing, no more."""
    whole = b"".join(map(hashed_line, values))
    kept = data.draw(st.integers(0, len(whole)))
    ends = [len(b"".join(map(hashed_line, values[: n + 1]))) for n in range(len(values))]
    found = [value for value, _ in whole_lines(whole[:kept])]
    assert found == values[: sum(end - 1 <= kept for end in ends)]


@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_a_bit_that_flipped_ends_it(values: list[dict[str, object]], data: st.DataObject) -> None:
    whole = bytearray(b"".join(map(hashed_line, values)))
    at = data.draw(st.integers(0, len(whole) - 1))
    before = whole[:at].count(b"\n")
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    assert [value for value, _ in whole_lines(bytes(whole))] == values[:before]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "gone")
