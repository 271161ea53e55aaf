"""The queue of a judgement: files to hash and panels to judge, on several threads.

Both kinds stand in one queue, file by file: of a file that is read for both, the second reading
comes from the page cache. Of several processes each has a queue of its own; ``Hashed`` and
``values.Found`` are what they bring together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsv4_quant.checkpoint.ahead import announced
from dsv4_quant.checkpoint.digest import LeafHasher
from dsv4_quant.checkpoint.panels import work_in_threads
from dsv4_quant.checkpoint.reader import NO_DESCRIPTOR, Bytes
from dsv4_quant.checkpoint.sums import HashKind
from dsv4_quant.progress import Progress
from dsv4_quant.validators.checksums import Hashes, hash_file
from dsv4_quant.validators.report import Check, Finding, error
from dsv4_quant.validators.values import ValuesPass
from dsv4_quant.validators.weight import Panel

CHUNK = 4 << 20


@dataclass(slots=True)
class Hashed:
    """What came out of hashing files."""

    hashes: dict[str, Hashes] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0

    def add(self, other: Hashed) -> None:
        """Other files, hashed by another process."""
        self.hashes |= other.hashes
        self.findings += other.findings
        self.seconds += other.seconds
        self.bytes += other.bytes

    def check(self) -> Check:
        """What the hashing looked at."""
        return Check("checksums", len(self.hashes), 0, self.bytes, 0, self.seconds)


@dataclass(slots=True)
class Work:
    """Files to hash, and what came out."""

    root: Path
    sizes: Mapping[str, int]
    progress: Progress
    to_hash: Mapping[str, Collection[HashKind]] = field(default_factory=dict)
    """File -> kinds of hashes that are wanted of it."""
    found: Hashed = field(default_factory=Hashed)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, values: ValuesPass | None, workers: int) -> None:
        """Does all of it; returns when the last item is done."""
        total = sum(self.sizes[file] for file in self.to_hash)
        self.progress.total(total + (values.nbytes() if values else 0))

        def worker() -> Callable[[str | Panel], None]:
            buffer, hasher = np.empty(CHUNK, np.uint8), LeafHasher()

            def do(item: str | Panel) -> None:
                if isinstance(item, str):
                    self._hash(item, buffer)
                elif values is not None:
                    values.work(item, hasher)

            return do

        work_in_threads(self._items(values), worker, workers)

    def _items(self, values: ValuesPass | None) -> Iterator[str | Panel]:
        panels = {} if values is None else dict(values.panels())
        alone = (file for file in self.to_hash if file not in panels)
        yield from sorted(alone, key=lambda file: -self.sizes[file])  # a long one last waits alone
        if values is None:
            return
        for file, items in panels.items():
            if file in self.to_hash:
                yield file
            yield from announced(items, values.announce)

    def _hash(self, file: str, buffer: Bytes) -> None:
        began = time.perf_counter()
        try:
            found = hash_file(self.root / file, self.to_hash[file], buffer, self.progress.advance)
        except OSError as wrong:
            if wrong.errno in NO_DESCRIPTOR:
                raise
            self.found.findings.append(
                error("bytes", f"cannot be read: {wrong.strerror}",
                      "The disk or the network does not give these bytes.", file=file)
            )  # fmt: skip
            return
        with self._lock:
            self.found.hashes[file] = found
            self.found.seconds += time.perf_counter() - began
            self.found.bytes += self.sizes[file]
