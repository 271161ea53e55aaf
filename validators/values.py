"""The third level: every number. One pass over the data, panel by panel, on any number of threads.

A finished weight leaves its findings and its digest behind and is forgotten, so the memory is that
of the panels in work, whatever the checkpoint's size.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import LeafHasher
from dsv4_quant.checkpoint.manifest import MANIFEST, Manifest
from dsv4_quant.checkpoint.panels import panel_rows, row_ranges
from dsv4_quant.errors import SourceChangedError
from dsv4_quant.validators.numbers import judge_expert_ids, judge_weight
from dsv4_quant.validators.report import Check, Finding, error, warning
from dsv4_quant.validators.rounding import Measured, judge_cost, judge_source
from dsv4_quant.validators.subject import Subject
from dsv4_quant.validators.weight import Advance, Panel, Weight, compare_panel, judge_panel


@dataclass(slots=True)
class Found:
    """What has been found out of some weights."""

    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Of every weight that has one, by name."""
    their_digests: dict[str, str] = field(default_factory=dict)
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Weight -> its file, and how it differs from the other checkpoint's."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """Of every weight that the manifest says was requantised, by name."""
    blank: set[str] = field(default_factory=set)
    seconds: float = 0.0
    their_seconds: float = 0.0
    bytes: int = 0
    their_bytes: int = 0
    compared: int = 0

    def add(self, other: Found) -> None:
        """Other weights, judged by another process."""
        self.findings += other.findings
        self.digests |= other.digests
        self.their_digests |= other.their_digests
        self.differences |= other.differences
        self.measured |= other.measured
        self.blank |= other.blank
        self.seconds += other.seconds
        self.their_seconds += other.their_seconds
        self.bytes += other.bytes
        self.their_bytes += other.their_bytes
        self.compared += other.compared


class ValuesPass:
    """Judges the sound weights of a subject, next to another checkpoint if there is one.

    ``manifest``: the subject's, if it has one; it says which weights were rounded.
    """

    def __init__(
        self,
        subject: Subject,
        checkpoint: Checkpoint,
        other: Checkpoint | None,
        manifest: Manifest | None,
        advance: Advance,
    ) -> None:
        self.found = Found()
        self.rounded: set[str] = set()
        """Weights that were rounded, and as the manifest declares; known when all is concluded."""
        self._subject, self._checkpoint, self._other = subject, checkpoint, other
        self._records = {} if manifest is None else manifest.tensors
        section = None if manifest is None else manifest.requantised
        self._costs = {} if section is None else section.tensors
        self._advance = advance
        self._lock = threading.Lock()
        self._chosen = dict(subject.sound)

    def choose(self, names: Container[str]) -> None:
        """Judges these weights only; other processes judge the others."""
        self._chosen = {name: spec for name, spec in self._chosen.items() if name in names}

    def sizes(self) -> dict[str, tuple[str, int]]:
        """By weight, the file that it begins in and the bytes to be read of both checkpoints."""
        return {name: (self._file(name), self._nbytes(s)) for name, s in self._chosen.items()}

    def nbytes(self) -> int:
        """Bytes that the pass will read, as far as can be told before."""
        return sum(map(self._nbytes, self._chosen.values()))

    def _nbytes(self, spec: TensorSpec) -> int:
        copies = self._checkpoint.gpus if spec.split is None else 1
        total = copies * sum(held.nbytes for held in self._checkpoint.stored(spec))
        if self._is_compared(spec):
            assert self._other is not None
            theirs = self._other.stored(self._other.specs[spec.name])
            total += sum(held.nbytes for held in theirs)
        return total

    def panels(self) -> Iterator[tuple[str, Iterator[Panel]]]:
        """(file, its panels) for each file that holds a weight's first rows, in files' order."""
        by_file: dict[str, list[TensorSpec]] = defaultdict(list)
        for spec in self._chosen.values():
            by_file[self._file(spec.name)].append(spec)
        for file in self._checkpoint.folder.headers:
            if file in by_file:
                yield file, self._panels_of(file, by_file[file])

    def _panels_of(self, file: str, specs: list[TensorSpec]) -> Iterator[Panel]:
        for spec in specs:
            is_compared = self._is_compared(spec)
            theirs = (self._other.specs[spec.name].format,) if is_compared and self._other else ()
            ranges = list(row_ranges(spec.matrix[0], panel_rows(spec, theirs)))
            weight = Weight(spec, file, len(ranges), is_compared=is_compared)
            if is_compared and all(form.kind != "i64" for form in (spec.format, *theirs)):
                weight.is_rounded = self._is_rounded(spec.name)
                is_measured = weight.is_rounded or spec.name in self._costs
                weight.measured = Measured() if is_measured else None
            for start, stop in ranges:
                yield Panel(weight, start, stop)

    def _is_compared(self, spec: TensorSpec) -> bool:
        theirs = None if self._other is None else self._other.specs.get(spec.name)
        return theirs is not None and theirs.shape == spec.shape

    def _is_rounded(self, name: str) -> bool:
        return name in self._records and self._records[name].source is not None

    def announce(self, panel: Panel) -> int:
        """Tells the disk that a panel will be read; how many bytes of both checkpoints that are."""
        rows = panel.weight.spec.name, panel.start, panel.stop
        count = self._checkpoint.announce(*rows, copies=True)
        if panel.weight.is_compared and self._other is not None:
            count += self._other.announce(*rows)
        return count

    def work(self, panel: Panel, hasher: LeafHasher) -> None:
        """One panel; called from any thread, each with a hasher of its own."""
        weight, began = panel.weight, time.perf_counter()
        read, their_bytes = 0, 0
        between = began
        try:
            experts = self._checkpoint.config.n_routed_experts
            held, leaves = judge_panel(panel, self._checkpoint, experts, hasher, self._advance)
            read, between = held.nbytes, time.perf_counter()
            if weight.is_compared and self._other is not None:
                their_bytes = compare_panel(panel, held, leaves, self._other, hasher, self._advance)
        except SourceChangedError as wrong:
            self._note_unread(weight, wrong)
        done = time.perf_counter()
        with self._lock:
            self.found.bytes += read
            self.found.their_bytes += their_bytes
            self.found.seconds += between - began
            self.found.their_seconds += done - between
        with weight.lock:
            weight.waiting -= 1
            is_last = weight.waiting == 0
        if is_last:
            self._finish(weight)

    def _note_unread(self, weight: Weight, wrong: SourceChangedError) -> None:
        with weight.lock:
            weight.mine.add(None)
            weight.theirs.add(None)
            weight.unread[wrong.file or weight.file] = wrong.what

    def _finish(self, weight: Weight) -> None:
        """All panels are in: findings, digest, difference."""
        spec, file, tally = weight.spec, weight.file, weight.tally
        wrong = [
            error("reading", what, "The disk or the network does not give these bytes.",
                  file=name.removeprefix(f"{self._subject.root}/"), tensor=spec.name)
            for name, what in weight.unread.items()
        ]  # fmt: skip
        if spec.format.kind == "i64":
            experts = self._checkpoint.config.n_routed_experts
            wrong += judge_expert_ids(spec, file, tally, experts)
        else:
            wrong += judge_weight(spec, file, tally)
        wrong += _judge_copies(weight)
        mine, theirs = weight.mine.finish(), weight.theirs.finish() if weight.is_compared else None
        with self._lock:
            found = self.found
            found.findings += wrong
            if mine is not None:
                found.digests[spec.name] = mine
            if theirs is not None:
                found.their_digests[spec.name] = theirs
            if tally.blocks and tally.dead == tally.blocks:
                found.blank.add(spec.name)
            found.compared += weight.is_compared and not weight.unread
            if weight.difference.count:
                found.differences[spec.name] = file, weight.difference.shown()
            if weight.measured is not None and not weight.unread:
                found.measured[spec.name] = weight.measured

    def conclude(self) -> tuple[list[Finding], list[Check]]:
        """What can be said when all is done."""
        found = self.found
        recorded = {name: record.digest for name, record in self._records.items()}
        owners = {digest: name for name, digest in recorded.items()}
        for name, digest in found.digests.items():
            if recorded.get(name, digest) != digest:
                found.findings.append(
                    error("digests", f"value digest {digest}", _whose(owners.get(digest), MANIFEST),
                          file=self._file(name), tensor=name,
                          expected=f"value digest {recorded[name]}")
                )  # fmt: skip
        their_owners = {digest: name for name, digest in found.their_digests.items()}
        for name, (file, shown) in found.differences.items():
            owner = their_owners.get(found.digests.get(name, ""))
            found.findings.append(
                error("against", shown, _whose(owner, "the other checkpoint"), file=file,
                      tensor=name)
            )  # fmt: skip
        for name in found.measured:
            found.findings += self._judge_rounded(name)
        found.findings += self._judge_doubles()
        judged, weights = len(self._subject.sound), len(self._checkpoint.specs)
        files = len(self._checkpoint.folder.headers)
        checks = [Check("values", files, judged, found.bytes, weights - judged, found.seconds)]
        if self._other is not None:
            theirs = len(self._other.folder.headers)
            checks.append(
                Check("against", theirs, found.compared, found.their_bytes,
                      len(self._other.specs) - found.compared, found.their_seconds)
            )  # fmt: skip
        return found.findings, checks

    def _judge_rounded(self, name: str) -> list[Finding]:
        """A requantised weight: made of the other's values, with the error that is stated."""
        found, record = self.found, self._records.get(name)
        mine, theirs = found.digests.get(name), found.their_digests.get(name)
        is_rounded = self._is_rounded(name)
        if record is None or (is_rounded and mine == theirs):  # then it is not next to its source
            return []
        wrong = list(judge_source(name, self._file(name), record, theirs)) if is_rounded else []
        if wrong or mine != record.digest or theirs != record.made_of:
            return wrong  # the other findings say of which values it is
        if name in self._costs:
            wrong += judge_cost(name, self._costs[name], found.measured[name])
            if is_rounded and not wrong:
                self.rounded.add(name)
        return wrong

    def _judge_doubles(self) -> Iterator[Finding]:
        """Two weights of equal values: one was written over the other. Norms may well be equal."""
        found = self.found
        first: dict[str, str] = {}
        for name, digest in sorted(found.digests.items()):
            if self._checkpoint.specs[name].kind == "fixed" or name in found.blank:
                continue
            twin = first.setdefault(digest, name)
            if twin != name:
                yield warning("doubles", f"the same values as {twin}",
                              "One of both was written over the other, or they were initialised"
                              " alike.", file=self._file(name), tensor=name)  # fmt: skip

    def _file(self, name: str) -> str:
        weight = self._checkpoint.stored(self._checkpoint.specs[name])[0]
        return self._checkpoint.locate(weight).extents[0].file


def _whose(owner: str | None, source: str) -> str:
    if owner is None:
        return "The values were changed."
    return f"These are the values that {source} has under {owner}: swapped or renumbered."


def _judge_copies(weight: Weight) -> Iterator[Finding]:
    for (file, tensor), spot in weight.copies.items():
        yield error("replicas", f"{spot.count:,} other bytes, the first in row {spot.row}",
                    "Every rank must hold the same; the ranks would compute different things.",
                    file=file, tensor=tensor, expected=f"the bytes of {weight.file}")  # fmt: skip
