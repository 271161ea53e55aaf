"""Notes: what they vouch for, and that a torn or damaged end is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_quant.errors import WriteError
from dsv4_quant.hub.notes import Notes, ranges_of
from dsv4_quant.hub.schedule import Range, Visit

EARLY = Visit("a", 0, 3, ((10, 20), (30, 40)), False)
WHOLE = Visit("a", 5, 8, ((0, 100),), True)
LATE = Visit("a", 20, 21, ((30, 35),), False)
VISITS = [EARLY, WHOLE, LATE]
FIRST, SECOND, THIRD = ranges_of("a", VISITS)[0], *ranges_of("a", VISITS)[1:]


def test_ranges_of_all_visits_but_the_whole() -> None:
    assert ranges_of("a", VISITS) == [Range("a", 10, 20), Range("a", 30, 35), Range("a", 30, 40)]
    assert ranges_of("b", VISITS) == []


def test_what_was_learnt_is_there_for_the_next(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    notes.learn({FIRST: "aa", SECOND: "bb"})
    notes.learn({THIRD: "cc"}, ["a"])
    notes.close()
    again = Notes(tmp_path / "notes")
    assert [again.digest(one) for one in (FIRST, SECOND, THIRD)] == ["aa", "bb", "cc"]
    assert again.is_whole("a") and not again.is_whole("b")
    again.learn({Range("b", 0, 1): "dd"})
    again.close()
    assert Notes(tmp_path / "notes").digest(Range("b", 0, 1)) == "dd"


def test_they_vouch_for_steps_whose_bytes_were_noted(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    assert notes.vouch(VISITS, 0) and not notes.vouch(VISITS, 1)
    notes.learn({Range("a", 10, 20): "aa"})
    assert not notes.vouch(VISITS, 1)
    notes.learn({Range("a", 30, 40): "bb"})
    assert notes.vouch(VISITS, 5) and not notes.vouch(VISITS, 6)
    notes.learn({Range("a", 30, 35): "cc"}, ["a"])
    assert notes.vouch(VISITS, 22)
    notes.condemn()
    assert not notes.vouch(VISITS, 0) and not Notes(tmp_path / "notes").vouch(VISITS, 0)
    notes.close()


def test_every_cut_and_every_changed_byte(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    notes = Notes(path)
    notes.learn({FIRST: "aa"})
    first = path.stat().st_size
    notes.learn({SECOND: "bb"}, ["a"])
    notes.close()
    content = path.read_bytes()
    damaged = [content[:at] for at in range(len(content))]
    damaged += [content[:at] + b"?" + content[at + 1 :] for at in range(len(content))]
    for number, text in enumerate(damaged):
        path.write_bytes(text)
        found = Notes(path)
        assert not found.is_whole("a") and found.digest(SECOND) is None
        assert found.digest(FIRST) == ("aa" if number % len(content) >= first else None)
    found.learn({}, ["b"])  # the damaged end is overwritten
    found.close()
    assert Notes(path).digest(FIRST) == "aa" and Notes(path).is_whole("b")


def test_notes_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot be written"):
        Notes(tmp_path / "none" / "notes").learn({FIRST: "aa"})
