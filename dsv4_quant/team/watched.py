"""The progress of one process among several: it tells of all, and stops when one has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from dsv4_quant.progress import Progress

State = tuple[str, int, int]
"""Stage, how much it has, how much of that is done."""


class Watched:
    """Passes on what this process does, and with ``show`` what the others have done.

    Each call first calls ``check``, which raises what has stopped the job.
    """

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self._progress, self._check = progress, check
        self._lock = threading.Lock()
        self._text, self._total, self._done = "", 0, 0
        self._others_total = self._others_done = 0

    def state(self) -> State:
        """For the other processes."""
        return self._text, self._total, self._done

    def stage(self, text: str, unit: str = "B") -> None:
        """Begins a stage of this process; what others do of the same stage is added."""
        self._check()
        with self._lock:
            self._text, self._total, self._done = text, 0, 0
            self._others_total = self._others_done = 0
        self._progress.stage(text, unit)

    def total(self, count: int) -> None:
        """Of this process alone."""
        self._check()
        with self._lock:
            self._total = count
            self._progress.total(count + self._others_total)

    def advance(self, count: int) -> None:
        """Called from any thread."""
        self._check()
        with self._lock:
            self._done += count
        self._progress.advance(count)

    def read(self, count: int) -> None:
        """Of this process alone."""
        self._check()
        self._progress.read(count)

    def note(self, text: str) -> None:
        """Of this process alone."""
        self._check()
        self._progress.note(text)

    def show(self, others: Iterable[State]) -> None:
        """Adds what the others have told of the stage that this process is in."""
        same = [state for state in others if state[0] == self._text]
        total, done = sum(state[1] for state in same), sum(state[2] for state in same)
        with self._lock:
            more, self._others_done = done - self._others_done, done
            if total != self._others_total:
                self._others_total = total
                self._progress.total(self._total + total)
        if more > 0:
            self._progress.advance(more)
