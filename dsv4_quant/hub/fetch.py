"""One visit's bytes, from the hub to the disk, checked while they pass.

A whole file must have the hash that the hub published, and every range that was used before, or
will be used later, must be what is in it. A range by itself must be what it was when it was seen
last; the whole file judges it in the end. Nothing is used before it has been checked as far as can
be, and what has been learnt is noted durably.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from dsv4_quant.errors import SourceDamagedError
from dsv4_quant.hub.connection import Connection
from dsv4_quant.hub.landing import Landing
from dsv4_quant.hub.notes import Notes
from dsv4_quant.hub.repository import RemoteFile, wrong_hash
from dsv4_quant.hub.schedule import Range, Span


class Tally:
    """Hashes of a file and of ranges of it, from its bytes in order."""

    def __init__(self, hasher: Any, ranges: Sequence[Range]) -> None:
        self._whole = hasher
        self._open: list[tuple[Range, Any]] = [(found, blake3()) for found in ranges]
        self.ranges: dict[Range, str] = {}

    def update(self, at: int, data: bytes) -> None:
        """The bytes from ``at`` on."""
        self._whole.update(data)
        view, end = memoryview(data), at + len(data)
        for found, hasher in self._open:
            if found.start < end and at < found.stop:
                hasher.update(view[max(found.start - at, 0) : found.stop - at])
        for found, hasher in self._open:
            if found.stop <= end:
                self.ranges[found] = hasher.hexdigest()
        self._open = [(found, hasher) for found, hasher in self._open if found.stop > end]

    @property
    def whole(self) -> str:
        """The hash of everything so far."""
        return str(self._whole.hexdigest())


def fetch_whole(
    connection: Connection,
    file: RemoteFile,
    landing: Landing,
    notes: Notes,
    ranges: Sequence[Range],
    kept: Sequence[Span],
) -> None:
    """Brings a file from front to back; ``kept`` is on the disk already and in use.

    What an interrupted run left of it is not fetched again, if the hash comes out right. Raises
    SourceDamagedError when it twice comes out wrong, or when bytes that were used earlier are not
    those of the file.
    """
    left = landing.filled() if landing.was_there else 0
    for start in (left, 0, 0) if left else (0, 0):
        tally = Tally(file.hasher(), ranges)
        for at, data in _pieces(connection, file, landing, start):
            tally.update(at, data)
            if at >= start:
                landing.write(at, data, kept)
        if tally.whole == file.hash:
            _compare(connection, file, notes, tally.ranges)
            return
    raise wrong_hash(connection.repository, file, tally.whole)


def _pieces(
    connection: Connection, file: RemoteFile, landing: Landing, start: int
) -> Iterator[tuple[int, bytes]]:
    """The file's bytes with their offsets: up to ``start`` from the disk, the rest from the hub."""
    at = 0
    for data in landing.read(0, start):
        yield at, data
        at += len(data)
    for data in connection.stream(file, start, file.size):
        yield at, data
        at += len(data)


def _compare(
    connection: Connection, file: RemoteFile, notes: Notes, found: Mapping[Range, str]
) -> None:
    for one, digest in found.items():
        if notes.digest(one) not in (None, digest):
            notes.condemn()
            raise SourceDamagedError(
                f"The hub sent bytes [{one.start:,}, {one.stop:,}) twice, and not the same; the"
                " second have the hash that it published",
                file=f"{connection.repository.name}/{file.name}",
                hint="What was made of the first is void: the same command begins anew.",
            )
    notes.learn(found, [file.name])


def fetch_ranges(
    connection: Connection,
    file: RemoteFile,
    landing: Landing,
    notes: Notes,
    ranges: Iterable[Range],
    kept: Sequence[Span],
) -> None:
    """Brings some ranges of a file; those that an interrupted run left are used again."""
    learnt: dict[Range, str] = {}
    for one in ranges:
        seen = notes.digest(one)
        if seen is not None and landing.was_there and _held(landing, one) == seen:
            continue
        for _ in range(2):
            hasher, at = blake3(), one.start
            for data in connection.stream(file, one.start, one.stop):
                hasher.update(data)
                landing.write(at, data, kept)
                at += len(data)
            digest = hasher.hexdigest()
            if seen in (None, digest):
                break
        else:
            raise SourceDamagedError(
                f"The hub sends other bytes [{one.start:,}, {one.stop:,}) than the first time",
                file=f"{connection.repository.name}/{file.name}",
                hint="A proxy or a mirror on the way may be damaged; run the same command again"
                " later: it continues.",
            )
        if seen is None:
            learnt[one] = digest
    if learnt:
        notes.learn(learnt)


def _held(landing: Landing, one: Range) -> str:
    hasher = blake3()
    for data in landing.read(one.start, one.stop):
        hasher.update(data)
    return str(hasher.hexdigest())
