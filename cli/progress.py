"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from dsv4_quant.cli.tables import duration, size
from dsv4_quant.cli.together import here
from dsv4_quant.progress import NoProgress, Progress

INTERVAL = 5.0
"""Seconds between two lines, where stderr is not a terminal."""

BYTES = "B"
"""The unit that most work is counted in."""


@contextmanager
def shown(*, quiet: bool) -> Iterator[Progress]:
    """A Progress for the library, shown while the block runs."""
    if quiet or not here().is_first:
        yield NoProgress()
        return
    progress = Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()


class Bar:
    """One tqdm bar per stage: bytes, rate, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._bar: Any = None

    def stage(self, text: str, unit: str = BYTES) -> None:
        """Leaves the bar before as it ended and begins another."""
        from tqdm import tqdm  # only here: 40 ms that most commands never need

        self.close()
        self._bar = tqdm(
            desc=text,
            unit=unit if unit == BYTES else f" {unit}",
            unit_scale=unit == BYTES,
            unit_divisor=1024,
            file=self._stream,
            dynamic_ncols=True,
        )

    def total(self, count: int) -> None:
        """Bytes of the stage."""
        if self._bar is None:
            self.stage("working")
        self._bar.total = count
        self._bar.refresh()

    def advance(self, count: int) -> None:
        """Bytes more; from any thread."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)

    def read(self, count: int) -> None:
        """Shown when the bar moves next."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_postfix_str(f"{size(count)} read", refresh=False)

    def note(self, text: str) -> None:
        """A line above the bar."""
        from tqdm import tqdm

        with self._lock:
            tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """Ends the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Lines:
    """Plain lines for logs: at the start and the end of a stage, and every five seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._lock = threading.Lock()
        self._text, self._unit, self._total, self._done, self._read = "", BYTES, 0, 0, 0
        self._began = self._told = clock()

    def stage(self, text: str, unit: str = BYTES) -> None:
        """Tells the end of the stage before, and that this one begins."""
        self.close()
        self._text, self._unit, self._total, self._done, self._read = text, unit, 0, 0, 0
        self._began = self._told = self._clock()
        self._print(f"{text} ...")

    def total(self, count: int) -> None:
        """Bytes of the stage."""
        self._total = count

    def advance(self, count: int) -> None:
        """Bytes more; from any thread."""
        with self._lock:
            self._done += count
            now = self._clock()
            if now - self._told >= INTERVAL:
                self._told = now
                self._print(self._line(now))

    def read(self, count: int) -> None:
        """Told with the next line."""
        self._read = count

    def note(self, text: str) -> None:
        """A line of its own."""
        self._print(text)

    def close(self) -> None:
        """Tells the end of the current stage."""
        if self._done:
            spent = self._clock() - self._began
            read = f", {size(self._read)} read" if self._read else ""
            self._print(f"{self._text}: {self._amount()} in {duration(spent)}{read}")
            self._done = 0

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._began, 1e-9)
        text = f"{self._text}: {self._amount(self._total)}"
        if self._total:
            text += f" ({100 * self._done // self._total} %)"
        if self._unit == BYTES:
            text += f", {size(rate)}/s"
        elif self._read:
            text += f", {size(self._read)} read"
        left = (self._total - self._done) / rate
        return f"{text}, {duration(left)} left" if left > 0 else text

    def _amount(self, total: int = 0) -> str:
        """Such as ``2.50 MiB of 100 MiB`` or ``3 of 45 steps``; without a total what is done."""
        counted, unit = (size, "") if self._unit == BYTES else ("{:,}".format, f" {self._unit}")
        of = f" of {counted(total)}" if total else ""
        return f"{counted(self._done)}{of}{unit}"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
