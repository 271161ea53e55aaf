"""The journal of a conversion, or of one part of it: a file of lines, each behind its own hash."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_quant.conversion.files import replace_durably
from dsv4_quant.durable import hashed_line, whole_lines
from dsv4_quant.errors import WriteError


@dataclass(frozen=True, slots=True)
class Cut:
    """A point that a run can continue from. Results are those of the steps since the last cut."""

    steps: int
    files: Mapping[str, tuple[int, str]]
    results: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """What an earlier run wrote down."""

    plan: Mapping[str, Any]
    stamps: Mapping[str, Any]
    cuts: tuple[Cut, ...] = ()


class Notes:
    """A journal's file. It is appended to by one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def read(self) -> Journal | None:
        """What an earlier run wrote, as far as its lines are whole; None if not even the first."""
        lines = self._lines()
        if not lines:
            return None
        first, *cuts = lines
        return Journal(first["plan"], first["stamps"], tuple(map(_parse_cut, cuts)))

    def _lines(self) -> list[dict[str, Any]]:
        """The lines up to the first that a power loss has torn, or that has lost a bit."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        return [value for value, _ in whole_lines(content)]

    def start(self, journal: Journal) -> None:
        """Writes a journal in place of what is there, to be continued."""
        lines = [{"plan": journal.plan, "stamps": journal.stamps}, *map(_cut_line, journal.cuts)]
        replace_durably(self._path, b"".join(map(hashed_line, lines)))
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def record(self, cut: Cut) -> None:
        """Appends a cut; on the disk when this returns."""
        assert self._fd >= 0
        data = hashed_line(_cut_line(cut))
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            raise WriteError(
                f"The journal cannot be written: {error.strerror}",
                file=self._path,
                hint="Make room and run the same command again.",
            ) from None

    def close(self) -> None:
        """Closes the file, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _cut_line(cut: Cut) -> dict[str, Any]:
    return {"steps": cut.steps, "files": cut.files, "results": cut.results}


def _parse_cut(line: Mapping[str, Any]) -> Cut:
    files = {name: (mark, sha256) for name, (mark, sha256) in line["files"].items()}
    return Cut(line["steps"], files, line["results"])
