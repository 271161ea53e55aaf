"""The part of a repository that is on the disk just now: waited for, admitted, given back.

Visits are brought in the order in which the steps need them, a few at a time, as many as the room
holds. Two rules keep that safe: a file has one visit on its way at a time, and bytes that a reader
may be using are neither written nor given back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

from dsv4_quant.hub.connection import Connection, Interrupted
from dsv4_quant.hub.fetch import fetch_ranges, fetch_whole
from dsv4_quant.hub.landing import Landing
from dsv4_quant.hub.notes import Notes, ranges_of
from dsv4_quant.hub.repository import RemoteFile
from dsv4_quant.hub.schedule import Range, Span, Visit

SUFFIX = ".incoming"
"""Of the files that bytes land in."""

FETCHERS = 4
"""Visits on their way at once."""


class _State(Enum):
    AWAITED = "awaited"
    COMING = "coming"
    HERE = "here"
    LEAVING = "leaving"
    GONE = "gone"


class Window:
    """Serves the steps from ``done`` on. Its threads begin at once and end with ``close``."""

    def __init__(
        self,
        connection: Connection,
        folder: Path,
        headers: Mapping[str, Range],
        visits: Sequence[Visit],
        room: int,
        done: int,
        notes: Notes,
    ) -> None:
        self._connection, self._notes = connection, notes
        self._files: Mapping[str, RemoteFile] = connection.repository.weights
        self._headers, self._visits, self._room = headers, visits, room
        self._states = [_State.GONE if v.last < done else _State.AWAITED for v in visits]
        self._pins = [0] * len(visits)
        self._of_file: dict[str, list[int]] = {name: [] for name in self._files}
        for index, visit in enumerate(visits):
            self._of_file[visit.file].append(index)
        self._next = self._held = 0
        self._done = done
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._landings: dict[str, Landing] = {}
        try:
            self._land(folder)
        except BaseException:
            self._close_files()
            raise
        self._threads = [threading.Thread(target=self._bring, daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def _land(self, folder: Path) -> None:
        """Makes all files to land in: nothing appears in the folder later.

        What an interrupted run left stays where it may serve: what has served already goes.
        """
        for name, indices in self._of_file.items():
            path = folder / (name + SUFFIX)
            if all(map(self._is_gone, indices)):
                path.unlink(missing_ok=True)
                continue
            landing = self._landings[name] = Landing(path, self._files[name].size)
            if landing.was_there:
                gone = [s for i in indices if self._is_gone(i) for s in self._visits[i].spans]
                used = [s for i in indices if not self._is_gone(i) for s in self._parts(i)]
                landing.free(gone, [(0, landing.filled()), *used])

    def _parts(self, index: int) -> tuple[Span, ...]:
        visit = self._visits[index]
        return () if visit.is_whole else visit.spans

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Fills a buffer with a file's bytes, as soon as they are here. Raises what went wrong."""
        if not len(out):
            return
        index = self._claim(file, offset, offset + len(out))
        try:
            self._landings[file].read_into(offset, out)
        finally:
            with self._changed:
                self._pins[index] -= 1
                self._changed.notify_all()

    def _claim(self, file: str, start: int, stop: int) -> int:
        """Waits for a visit that brings these bytes, and keeps it here for the caller."""
        able = [i for i in self._of_file[file] if self._visits[i].covers(start, stop)]

        def here() -> int | None:
            return next((i for i in able if self._states[i] is _State.HERE), None)

        with self._changed:
            while (index := here()) is None:
                self._check()
                if all(self._states[i] in (_State.LEAVING, _State.GONE) for i in able):
                    raise RuntimeError(f"{file} [{start}, {stop}) is read when nobody expects it")
                self._changed.wait()
            self._pins[index] += 1
            return index

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _bring(self) -> None:
        """A thread: the next visit for which there is room, until there is none left."""
        try:
            while (index := self._admit()) is not None:
                self._fetch(index)
                self._become(index, _State.HERE)
                self.release(self._done)  # of a file that nobody reads it is time already
        except BaseException as error:
            self._fail(error)

    def _admit(self) -> int | None:
        with self._changed:
            while True:
                self._check()
                while self._next < len(self._visits) and self._is_gone(self._next):
                    self._next += 1
                if self._next == len(self._visits):
                    return None
                visit = self._visits[self._next]
                if self._held + visit.nbytes <= self._room and not self._is_busy(visit.file):
                    self._held += visit.nbytes
                    self._states[self._next] = _State.COMING
                    self._next += 1
                    return self._next - 1
                self._changed.wait()

    def _is_gone(self, index: int) -> bool:
        return self._states[index] is _State.GONE

    def _is_busy(self, file: str) -> bool:
        busy = (_State.COMING, _State.LEAVING)
        return any(self._states[index] in busy for index in self._of_file[file])

    def _fetch(self, index: int) -> None:
        visit = self._visits[index]
        file, landing = self._files[visit.file], self._landings[visit.file]
        kept = self._in_use(visit.file, (_State.HERE,))
        if visit.is_whole:
            listed = [self._headers[visit.file], *ranges_of(visit.file, self._visits)]
            fetch_whole(self._connection, file, landing, self._notes, listed, kept)
        else:
            ranges = [Range(visit.file, *span) for span in visit.spans]
            fetch_ranges(self._connection, file, landing, self._notes, ranges, kept)

    def _in_use(self, file: str, states: tuple[_State, ...]) -> list[Span]:
        with self._changed:
            held = (i for i in self._of_file[file] if self._states[i] in states)
            return [span for index in held for span in self._visits[index].spans]

    def _become(self, index: int, state: _State) -> None:
        with self._changed:
            self._states[index] = state
            if state is _State.GONE:
                self._held -= self._visits[index].nbytes
            self._changed.notify_all()

    def release(self, done: int) -> None:
        """Gives back what only steps before ``done`` need: no run will ever begin there again."""
        with self._changed:
            self._done = max(self._done, done)
        for index, visit in enumerate(self._visits):
            if visit.last < done and self._leave(index):
                kept = self._in_use(visit.file, (_State.COMING, _State.HERE))
                self._landings[visit.file].free(visit.spans, kept)
                self._become(index, _State.GONE)

    def _leave(self, index: int) -> bool:
        """Whether a visit was here and now nobody reads it any more."""
        with self._changed:
            if self._states[index] is not _State.HERE:
                return False
            self._states[index] = _State.LEAVING
            while self._pins[index]:
                self._check()
                self._changed.wait()
            return True

    def confirm(self) -> None:
        """All files have passed with the right hash: without that no output may be finished."""
        missing = [name for name in self._files if not self._notes.is_whole(name)]
        if missing:
            raise RuntimeError(f"{missing[0]} was never checked against its hash")

    def halt(self) -> None:
        """Whoever waits here gets Interrupted: the run has ended for another reason."""
        self._connection.halt()
        self._fail(Interrupted())

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all threads and closes all files."""
        self.halt()
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        for landing in self._landings.values():
            landing.close()
        self._notes.close()
