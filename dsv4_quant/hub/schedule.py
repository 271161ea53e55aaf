"""Which ranges of which files must be on the disk for which steps: pure data, from a list of reads.

A conversion reads a file once, or in several *visits*: the small tensors of all files first, say,
and much later the experts, file after file. Of the visits of a file the largest is its *whole*
visit: for it the file is fetched from front to back, so that its hash can be checked before a byte
of it is used. For the others only the ranges that are read are fetched; they are compared with what
passes in the whole visit. What a visit brought is given back after a cut of the journal that lies
behind its last step: a run that is continued there does not need it any more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 4096
"""Disks give space in blocks."""

PATIENCE = 16
"""A visit ends when more than this part of its file's size is read elsewhere in between."""

HOLE_BYTES = 64 << 10
"""Two ranges that lie closer are fetched as one: a request costs more."""

Span = tuple[int, int]
"""[start, stop) in a file."""


class Range(NamedTuple):
    """Bytes [start, stop) of a file."""

    file: str
    start: int
    stop: int


Reads = Sequence[Sequence[Range]]
"""What every step reads, in the order of the steps."""


@dataclass(frozen=True, slots=True)
class Visit:
    """Steps first to last read ``spans`` of a file, and perhaps others nothing of it between."""

    file: str
    first: int
    last: int
    spans: tuple[Span, ...]
    is_whole: bool

    @property
    def nbytes(self) -> int:
        """The disk space that it takes, in whole blocks."""
        return sum(-(-stop // BLOCK) - start // BLOCK for start, stop in self.spans) * BLOCK

    def covers(self, start: int, stop: int) -> bool:
        """Whether [start, stop) is among what it brings."""
        index = bisect_right(self.spans, (start, 1 << 62)) - 1
        return index >= 0 and stop <= self.spans[index][1]


@dataclass(slots=True)
class _Stretch:
    """A visit that is being put together; ``until``: bytes read by all files up to its end."""

    first: int
    last: int
    until: int
    spans: list[Span] = field(default_factory=list)


def visits(reads: Reads, sizes: Mapping[str, int]) -> tuple[Visit, ...]:
    """All visits of all files in the order of their first steps.

    A file that no step reads is visited before the first: its hash is checked like the others'.
    """
    found: dict[str, list[_Stretch]] = {name: [] for name in sizes}
    passed = 0
    for step, ranges in enumerate(reads):
        before = passed
        for file, start, stop in ranges:
            stretches = found[file]
            if not stretches or (before - stretches[-1].until) * PATIENCE > sizes[file]:
                stretches.append(_Stretch(step, step, before))
            stretches[-1].last = step
            stretches[-1].spans.append((start, stop))
            passed += stop - start
        for file, _, _ in ranges:
            found[file][-1].until = passed
    all_visits = (v for name, s in found.items() for v in _visits_of(name, sizes[name], s))
    return tuple(sorted(all_visits, key=lambda visit: (visit.first, visit.file)))


def _visits_of(file: str, size: int, stretches: list[_Stretch]) -> Iterator[Visit]:
    everything = ((0, size),)
    if not stretches:
        yield Visit(file, 0, 0, everything, True)
        return
    merged = [tuple(merge(stretch.spans, HOLE_BYTES)) for stretch in stretches]
    sums = [sum(stop - start for start, stop in spans) for spans in merged]
    largest = max(range(len(sums)), key=lambda index: (sums[index], index))
    for index, stretch in enumerate(stretches):
        spans = everything if index == largest else merged[index]
        yield Visit(file, stretch.first, stretch.last, spans, index == largest)


def room(found: Sequence[Visit], cuts: Iterable[int]) -> int:
    """Bytes of disk with which the visits can be served, however the steps are timed.

    Between two cuts, all visits that overlap these steps may have to be there at once: that is the
    least that cannot come to a standstill. One whole file more lets the next arrive while the last
    waits for its cut. Edges of spans that share a block with others cost up to two blocks each.
    """
    least = begin = 0
    for cut in cuts:
        held = sum(visit.nbytes for visit in found if visit.first < cut and visit.last >= begin)
        least, begin = max(least, held), cut
    ahead = max((visit.nbytes for visit in found), default=0)
    return least + ahead + 2 * BLOCK * sum(len(visit.spans) for visit in found)


def merge(spans: Iterable[Span], hole: int = 0) -> list[Span]:
    """Sorted, those that overlap or touch (or lie no farther apart than ``hole``) joined."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= hole:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def without(spans: Iterable[Span], others: Iterable[Span]) -> Iterator[Span]:
    """What remains of the spans outside the others."""
    blocked = merge(others)
    for start, stop in spans:
        at = start
        for low, high in blocked:
            if high <= at:
                continue
            if low >= stop:
                break
            if low > at:
                yield at, low
            at = max(at, high)
        if at < stop:
            yield at, stop
