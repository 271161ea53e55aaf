"""What has been learnt of the hub's bytes, on the disk before anything is made of them.

A conversion uses some ranges of a file before the whole file has passed and its hash is known to be
right. Their hashes stand here, to be compared when it passes, maybe by a later run; and which files
have passed. One JSON object per line behind its own hash, as in the journal; a torn end is dropped.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4_quant.durable import hashed_line, sync_folder, whole_lines
from dsv4_quant.errors import WriteError
from dsv4_quant.hub.schedule import Range, Visit


class Notes:
    """The notes beside a journal. Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ranges: dict[Range, str] = {}
        self._whole: set[str] = set()
        self._void = False
        self._file: int | None = None
        self._size = 0
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        for said, line in whole_lines(content):
            if not line.endswith(b"\n"):
                break
            self._take(said)
            self._size += len(line)

    def _take(self, said: Mapping[str, Any]) -> None:
        self._void = self._void or bool(said.get("void"))
        self._whole.update(said.get("whole", ()))
        for file, start, stop, digest in said.get("ranges", ()):
            self._ranges[Range(file, start, stop)] = digest

    def digest(self, found: Range) -> str | None:
        """The BLAKE3 of a range that has been seen."""
        with self._lock:
            return self._ranges.get(found)

    def is_whole(self, file: str) -> bool:
        """Whether the whole file has passed, with the right hash."""
        with self._lock:
            return file in self._whole

    def vouch(self, visits: Iterable[Visit], done: int) -> bool:
        """Whether all that the first ``done`` steps read was checked, or can still be."""
        if self._void:
            return False
        for visit in visits:
            if visit.first >= done or (visit.is_whole and self.is_whole(visit.file)):
                continue
            ranges = [Range(visit.file, *span) for span in visit.spans]
            if visit.is_whole or any(self.digest(found) is None for found in ranges):
                return False
        return True

    def learn(self, ranges: Mapping[Range, str], whole: Iterable[str] = ()) -> None:
        """Remembers hashes of ranges, and files that are as they should be."""
        listed = [[*found, digest] for found, digest in ranges.items()]
        self._append({"whole": list(whole), "ranges": listed})

    def condemn(self) -> None:
        """Something was made of bytes that are not the file's: nothing can be continued."""
        self._append({"void": True})

    def _append(self, said: Mapping[str, Any]) -> None:
        with self._lock:
            try:
                self._write(hashed_line(said))
            except OSError as error:
                raise WriteError(
                    f"Notes on the hub's files cannot be written: {error.strerror}",
                    file=self._path,
                    hint="Make room and run the same command again: it continues.",
                ) from None
            self._take(said)

    def _write(self, line: bytes) -> None:
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._path, flags, 0o644)
            os.ftruncate(self._file, self._size)
            sync_folder(self._path.parent)
        if os.pwrite(self._file, line, self._size) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file)
        self._size += len(line)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def ranges_of(file: str, visits: Sequence[Visit]) -> list[Range]:
    """What other visits than the whole one read of a file: to be compared with what passes."""
    return sorted(
        {
            Range(file, *span)
            for visit in visits
            if visit.file == file and not visit.is_whole
            for span in visit.spans
        }
    )
