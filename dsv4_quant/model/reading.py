"""What a pass reads, against what it needs; and how long it waited for that.

A pass needs every tensor that all tokens go through, the embedding's rows of the tokens that occur,
and the experts that any token was routed to: each byte of them once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dsv4_quant.catalogue import TensorSpec, stored


@dataclass(frozen=True, slots=True)
class Reading:
    """The bytes of one pass, and its time against the disk's."""

    bytes_read: int
    bytes_needed: int
    seconds: float
    """The whole pass."""
    waited: float
    """Of these, seconds in which nothing was computed because a weight was not there yet."""
    busy: float
    """Seconds in which at least one read was under way."""
    device: str = "cpu"
    """What computed the products."""

    @property
    def rate(self) -> float:
        """Bytes per second that the disk, or the page cache, gave while it was being read."""
        return self.bytes_read / self.busy if self.busy else 0.0

    def to_json(self) -> dict[str, float | str]:
        """As JSON's own types; seconds to the millisecond."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_needed": self.bytes_needed,
            "seconds": round(self.seconds, 3),
            "waiting_seconds": round(self.waited, 3),
            "reading_seconds": round(self.busy, 3),
            "bytes_per_reading_second": round(self.rate),
            "device": self.device,
        }


def side_by_side(readings: Sequence[Reading]) -> Reading:
    """Of processes that work at the same time: bytes add up, times are the longest."""
    return Reading(
        bytes_read=sum(one.bytes_read for one in readings),
        bytes_needed=sum(one.bytes_needed for one in readings),
        seconds=max(one.seconds for one in readings),
        waited=max(one.waited for one in readings),
        busy=max(one.busy for one in readings),
        device=", ".join(sorted({one.device for one in readings})),
    )


class Meter:
    """Counts reads that run on several threads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._busy = self._waited = 0.0
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around one read, on any thread."""
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._busy += time.monotonic() - self._since

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what keeps the computing thread from computing."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began

    def add(self, count: int) -> None:
        """So many bytes were read."""
        with self._lock:
            self.bytes += count

    def summary(self, needed: int, seconds: float, device: str = "cpu") -> Reading:
        """What was counted; when nothing is being read any more."""
        return Reading(self.bytes, needed, seconds, self._waited, self._busy, device)


def stored_bytes(spec: TensorSpec) -> int:
    """Bytes of a weight on disk, scales included; the same in both layouts."""
    return sum(tensor.nbytes for tensor in stored(spec, "hf"))


def needed_bytes(
    specs: Mapping[str, TensorSpec], tokens: Collection[int], hit: Sequence[Collection[int]]
) -> int:
    """What a pass cannot do without.

    Args:
        specs: every weight of the checkpoint.
        tokens: the ids that occur, each once.
        hit: per layer that was run, the experts that any token went to.
    """
    experts = [frozenset(one) for one in hit]
    total = 0
    for spec in specs.values():
        if spec.layer is None:
            rows = len(tokens) if spec.role == "embed" else spec.shape[0]
            total += stored_bytes(spec) // spec.shape[0] * rows
        elif spec.layer < len(hit) and (spec.expert is None or spec.expert in experts[spec.layer]):
            total += stored_bytes(spec)
    return total
