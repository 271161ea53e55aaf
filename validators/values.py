"""The third level: every number. One pass over the data, panel by panel, on any number of threads.

A finished weight leaves its findings and its digest behind and is forgotten, so the memory is that
of the panels in work, whatever the checkpoint's size.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import LeafHasher
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.panels import panel_rows, row_ranges
from dsv4_quant.errors import SourceChangedError
from dsv4_quant.validators.numbers import judge_expert_ids, judge_weight
from dsv4_quant.validators.report import Check, Finding, error, warning
from dsv4_quant.validators.subject import Subject
from dsv4_quant.validators.weight import Advance, Panel, Weight, compare_panel, judge_panel


class ValuesPass:
    """Judges the sound weights of a subject, next to another checkpoint if there is one."""

    def __init__(
        self, subject: Subject, checkpoint: Checkpoint, other: Checkpoint | None, advance: Advance
    ) -> None:
        self.findings: list[Finding] = []
        self.digests: dict[str, str] = {}
        """Of every weight that has one, by name."""
        self.their_digests: dict[str, str] = {}
        self._differences: dict[str, tuple[str, str]] = {}
        """Weight -> its file, and how it differs from the other checkpoint's."""
        self._blank: set[str] = set()
        self._subject, self._checkpoint, self._other = subject, checkpoint, other
        self._advance = advance
        self._lock = threading.Lock()
        self._seconds = self._their_seconds = 0.0
        self._bytes = self._their_bytes = self._compared = 0

    def nbytes(self) -> int:
        """Bytes that the pass will read, as far as can be told before."""
        total = 0
        for spec in self._subject.sound.values():
            copies = self._checkpoint.gpus if spec.split is None else 1
            total += copies * sum(held.nbytes for held in self._checkpoint.stored(spec))
            if self._is_compared(spec):
                assert self._other is not None
                theirs = self._other.stored(self._other.specs[spec.name])
                total += sum(held.nbytes for held in theirs)
        return total

    def panels(self) -> Iterator[tuple[str, Iterator[Panel]]]:
        """(file, its panels) for each file that holds a weight's first rows, in files' order."""
        by_file: dict[str, list[TensorSpec]] = defaultdict(list)
        for spec in self._subject.sound.values():
            weight = self._checkpoint.stored(spec)[0]
            by_file[self._checkpoint.locate(weight).extents[0].file].append(spec)
        for file in self._checkpoint.folder.headers:
            if file in by_file:
                yield file, self._panels_of(file, by_file[file])

    def _panels_of(self, file: str, specs: list[TensorSpec]) -> Iterator[Panel]:
        for spec in specs:
            is_compared = self._is_compared(spec)
            theirs = (self._other.specs[spec.name].format,) if is_compared and self._other else ()
            ranges = list(row_ranges(spec.matrix[0], panel_rows(spec, theirs)))
            weight = Weight(spec, file, len(ranges), is_compared=is_compared)
            for start, stop in ranges:
                yield Panel(weight, start, stop)

    def _is_compared(self, spec: TensorSpec) -> bool:
        theirs = None if self._other is None else self._other.specs.get(spec.name)
        return theirs is not None and theirs.shape == spec.shape

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
            self._bytes += read
            self._their_bytes += their_bytes
            self._seconds += between - began
            self._their_seconds += done - between
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
        found = [
            error("reading", what, "The disk or the network does not give these bytes.",
                  file=name.removeprefix(f"{self._subject.root}/"), tensor=spec.name)
            for name, what in weight.unread.items()
        ]  # fmt: skip
        if spec.format.kind == "i64":
            experts = self._checkpoint.config.n_routed_experts
            found += judge_expert_ids(spec, file, tally, experts)
        else:
            found += judge_weight(spec, file, tally)
        found += _judge_copies(weight)
        mine, theirs = weight.mine.finish(), weight.theirs.finish() if weight.is_compared else None
        with self._lock:
            self.findings += found
            if mine is not None:
                self.digests[spec.name] = mine
            if theirs is not None:
                self.their_digests[spec.name] = theirs
            if tally.blocks and tally.dead == tally.blocks:
                self._blank.add(spec.name)
            self._compared += weight.is_compared and not weight.unread
            if weight.difference.count:
                self._differences[spec.name] = file, weight.difference.shown()

    def conclude(self, recorded: Mapping[str, str]) -> tuple[list[Finding], list[Check]]:
        """What can be said when all is done. ``recorded``: the manifest's digests, by weight."""
        owners = {digest: name for name, digest in recorded.items()}
        for name, digest in self.digests.items():
            if recorded.get(name, digest) != digest:
                self.findings.append(
                    error("digests", f"value digest {digest}", _whose(owners.get(digest), MANIFEST),
                          file=self._file(name), tensor=name,
                          expected=f"value digest {recorded[name]}")
                )  # fmt: skip
        their_owners = {digest: name for name, digest in self.their_digests.items()}
        for name, (file, shown) in self._differences.items():
            owner = their_owners.get(self.digests.get(name, ""))
            self.findings.append(
                error("against", shown, _whose(owner, "the other checkpoint"), file=file,
                      tensor=name)
            )  # fmt: skip
        self.findings += self._judge_doubles()
        judged, weights = len(self._subject.sound), len(self._checkpoint.specs)
        files = len(self._checkpoint.folder.headers)
        checks = [Check("values", files, judged, self._bytes, weights - judged, self._seconds)]
        if self._other is not None:
            theirs = len(self._other.folder.headers)
            checks.append(
                Check("against", theirs, self._compared, self._their_bytes,
                      len(self._other.specs) - self._compared, self._their_seconds)
            )  # fmt: skip
        return self.findings, checks

    def _judge_doubles(self) -> Iterator[Finding]:
        """Two weights of equal values: one was written over the other. Norms may well be equal."""
        first: dict[str, str] = {}
        for name, digest in sorted(self.digests.items()):
            if self._checkpoint.specs[name].kind == "fixed" or name in self._blank:
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
