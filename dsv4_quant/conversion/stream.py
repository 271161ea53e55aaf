"""The streaming pass: read a panel, digest it, cast it, write it, hash it; on several threads.

Panels are handed out in the plan's order, so every file grows from front to back, give or take the
few panels in flight. At every cut (about each GiB) a thread of its own waits until all bytes before
it are hashed, makes them durable, and records the cut in the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.ahead import announced
from dsv4_quant.checkpoint.digest import LeafHasher
from dsv4_quant.checkpoint.panels import panel_rows, row_ranges, work_in_threads
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.casts import Casts, OnProcessor
from dsv4_quant.conversion.certificate import find_tile
from dsv4_quant.conversion.files import OutputFile
from dsv4_quant.conversion.journal import Resume, Workspace
from dsv4_quant.conversion.keeping import Keeper
from dsv4_quant.conversion.moving import Mover
from dsv4_quant.conversion.notes import Notes
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.plan import COPY, Plan, Step
from dsv4_quant.conversion.results import OpenWeight, Result
from dsv4_quant.conversion.source import not_as_stated
from dsv4_quant.formats.blocks import SCALES, Tensor
from dsv4_quant.progress import Progress

BATCH_BYTES = 1 << 20
"""Small tensors are handed out together until they are worth a thread's while."""


@dataclass(frozen=True, slots=True)
class Bite:
    """Rows [start, stop) of the weight of one step."""

    step: int
    start: int
    stop: int


class Stream:
    """One run over a plan's steps, from the resume point to the end."""

    def __init__(
        self,
        plan: Plan,
        work: Workspace,
        notes: Notes,
        resume: Resume,
        *,
        values: int,
        progress: Progress,
        stated: Mapping[str, str],
        mover: Mover | None = None,
        casts: Callable[[], Casts] = OnProcessor,
    ) -> None:
        self._plan, self._progress, self._stated = plan, progress, stated
        self._casts, self._values = casts, values
        self._first = resume.steps
        self.results = {name: Result.from_json(r) for name, r in resume.results.items()}
        self._widest = self._widest_before()
        self._open: dict[int, OpenWeight] = {}
        self._keeper = Keeper(plan, notes, self.results, mover)
        self._pending, self._room = 0, threading.Condition()
        self._failed: list[BaseException] = []
        self.files: list[OutputFile] = []
        try:
            for index, file in enumerate(plan.files):
                self.files.append(
                    OutputFile(
                        work.locate(file.name),
                        file.size,
                        self._keeper.marks(index),
                        kind=plan.request.sums,
                        reserve=mover is None,
                    )
                )
                if file.name in resume.prefixes:
                    self.files[-1].continue_from(*resume.prefixes[file.name])
        except BaseException:
            self.close()
            raise

    def _widest_before(self) -> tuple[int, int, int]:
        """Of an earlier run's results: the widest spread, at the first step that has it."""
        ranks = [(-1, 0, 0)]  # zeros alone have no spread, and a first tile all the same
        for index in range(self._first):
            step = self._plan.steps[index]
            has_result = step.owned and not step.out.is_scale
            worst = self.results[step.spec.name].proof.worst if has_result else None
            if worst is not None:
                ranks.append((worst[0], -index, 0))
        return max(ranks)

    def run(self, workers: int) -> None:
        """Works through all steps. Raises the first error, of whatever thread."""
        journal = threading.Thread(target=self._keep_journal, daemon=True)
        journal.start()
        try:
            self._write_headers()
            batches = self._admitted(4 * workers * self._values)
            work_in_threads(batches, self._worker, workers, self._plan.source.halt)
            journal.join()
        except BaseException as error:
            self._fail(error)
            journal.join()
            if isinstance(error, Exception):
                raise self._failed[0] from None  # others may be its echoes
            raise
        if self._failed:
            raise self._failed[0]

    def _worker(self) -> Callable[[list[Bite]], None]:
        hasher, casts = LeafHasher(), self._casts()

        def work(batch: list[Bite]) -> None:
            try:
                for bite in batch:
                    self._take(bite, hasher, casts)
            except BaseException as error:
                self._fail(error)
                raise
            with self._room:
                self._room.notify_all()

        return work

    def _fail(self, error: BaseException) -> None:
        """Wakes whoever waits: what they wait for will not come."""
        with self._room:
            self._failed.append(error)
            self._room.notify_all()
        self._plan.source.halt()

    def _admitted(self, limit: int) -> Iterator[list[Bite]]:
        """Batches, each when there is room for more bytes that wait to be hashed.

        The wait is here, where batches are handed out in order: a batch that has been handed out
        never waits, so the one that closes a gap cannot wait for those behind it.
        """
        for batch in announced(self._batches(), self._announce):
            with self._room:
                self._room.wait_for(lambda: self._pending < limit or self._failed)
                if self._failed:
                    raise self._failed[0]
            yield batch

    def _write_headers(self) -> None:
        for file, written in zip(self._plan.files, self.files, strict=True):
            if written.hashed < len(file.header):
                written.write(0, memoryview(file.header))

    def _batches(self) -> Iterator[list[Bite]]:
        batch: list[Bite] = []
        size = 0
        for index in range(self._first, len(self._plan.steps)):
            step = self._plan.steps[index]
            rows = step.spec.matrix[0]
            height = panel_rows(step.spec, (step.out.spec.format,), self._values)
            if step.owned and not step.out.is_scale:
                self._open[index] = OpenWeight.of(step, -(-rows // height))
            for start, stop in row_ranges(rows, height):
                if not step.needs(start, stop):
                    continue
                batch.append(Bite(index, start, stop))
                size += step.out.nbytes * (stop - start) // rows
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _announce(self, batch: list[Bite]) -> int:
        count = 0
        for bite in batch:
            step = self._plan.steps[bite.step]
            rows, codes = (step.spec.name, bite.start, bite.stop), step.needs_codes
            copies = not codes or (step.owned and not step.out.is_scale)  # as ``_take`` reads them
            count += self._plan.source.announce(*rows, codes=codes, copies=copies)
        return count

    def _take(self, bite: Bite, hasher: LeafHasher, casts: Casts) -> None:
        """One bite, all the way from the source to the output files."""
        step = self._plan.steps[bite.step]
        source, spec = self._plan.source, step.spec
        if step.out.is_scale:
            data, first = self._scales(step, bite, casts)
        elif not step.owned:
            data, first = self._codes(step, bite, casts), bite.start
        else:
            panel = source.read_rows(spec.name, bite.start, bite.stop, copies=True)
            held = Panel(spec.name, bite.start, panel, step.out.spec.format)
            weight, first, proof = self._open[bite.step], bite.start, Proof()
            if step.lossy:
                data = self._rounded(weight, held, hasher, casts)
            else:
                data = casts.weight(step.operation, held, proof)
                self._look_up_worst(bite, held, proof)
            for leaf in hasher.leaves(spec.name, panel, bite.start):
                weight.read.add(*leaf)
            self._finish(bite.step, proof)
        rows = 1 if len(spec.shape) == 1 else data.shape[0]
        self._write(step, first, data.reshape(rows, -1).view(np.uint8))

    def _codes(self, step: Step, bite: Bite, casts: Casts) -> NDArray[Any]:
        """The output's rows for a bite of a weight that another part answers for."""
        name = step.spec.name
        panel = self._plan.source.read_rows(name, bite.start, bite.stop)
        held = Panel(name, bite.start, panel, step.out.spec.format)
        if step.lossy:
            return casts.requantise(held, self._plan.request.rule).tensor.codes
        return casts.weight(step.operation, held, Proof())

    def _look_up_worst(self, bite: Bite, panel: Panel, proof: Proof) -> None:
        """Finds the widest tile of a panel, where it may be the plan's first widest one."""
        if not proof.spreads:
            return
        spread = max(proof.spreads)
        rank = (spread, -bite.step, -bite.start)
        with self._room:
            if rank <= self._widest:
                return
            self._widest = rank
        proof.worst = (spread, *find_tile(panel, spread))

    def _rounded(
        self, weight: OpenWeight, panel: Panel, hasher: LeafHasher, casts: Casts
    ) -> NDArray[Any]:
        """Codes of the rows in their new format; what that costs is kept until the last bite."""
        rounded = casts.requantise(panel, self._plan.request.rule)
        weight.figures[panel.first_row] = rounded.figures
        weight.moved[panel.first_row] = rounded.moved
        for leaf in hasher.leaves(panel.name, rounded.tensor, panel.first_row):
            weight.written.add(*leaf)
        return rounded.tensor.codes

    def _finish(self, index: int, proof: Proof) -> None:
        """Adds a bite's proof; the last bite of a weight completes its result."""
        with self._room:
            weight = self._open[index]
            weight.proof.add(proof)
            weight.panels -= 1
            if weight.panels:
                return
            result, name = weight.result(), weight.step.spec.name
            if self._stated.get(name, result.read) != result.read:
                raise not_as_stated(self._plan.source, name)
            self.results[name] = result
            del self._open[index]

    def _scales(self, step: Step, bite: Bite, casts: Casts) -> tuple[NDArray[Any], int]:
        """The output's scale rows for a bite, and the number of the first."""
        block = step.out.spec.format.block
        assert block is not None
        first = bite.start // block[0]
        if step.operation == COPY:
            return read_scales(self._plan.source, step.spec, bite.start, bite.stop), first
        if not step.needs_codes:
            held = read_scales(self._plan.source, step.spec, bite.start, bite.stop)
            codes = np.empty((bite.stop - bite.start, 0), np.uint8)
            shape = (bite.stop - bite.start, step.spec.matrix[1])
            panel = Tensor(step.spec.format, shape, codes, held)
        else:
            panel = self._plan.source.read_rows(step.spec.name, bite.start, bite.stop)
        held_panel = Panel(step.spec.name, bite.start, panel, step.out.spec.format)
        if step.lossy:
            return casts.rounded_scales(held_panel, self._plan.request.rule), first
        return casts.scale(step.operation, held_panel), first

    def _write(self, step: Step, first: int, data: NDArray[np.uint8]) -> None:
        """Rows of an output tensor, to every file that holds some of their bytes."""
        last = first + data.shape[0]
        for target in step.targets:
            start, stop = max(first, target.row), min(last, target.row + target.rows)
            if start >= stop:
                continue
            part = data[start - first : stop - first]
            if target.row_bytes != data.shape[1]:
                part = part[:, target.column : target.column + target.row_bytes]
            view = np.ascontiguousarray(part).data.cast("B")
            with self._room:
                self._pending += len(view)
            offset = target.offset + (start - target.row) * target.row_bytes
            hashed = self.files[target.file].write(offset, view)
            self._progress.advance(len(view))
            with self._room:
                self._pending -= hashed
                if hashed:
                    self._room.notify_all()

    def _keep_journal(self) -> None:
        try:
            self._keeper.keep(self.files, self._first, self._wait)
        except BaseException as error:
            self._fail(error)

    def _wait(self, is_so: Callable[[], bool]) -> bool:
        """Until it is so, or the run has failed."""
        with self._room:
            self._room.wait_for(lambda: self._failed or is_so())
            return not self._failed

    def close(self) -> None:
        """Closes all output files."""
        for file in self.files:
            file.close()


def read_scales(source: Checkpoint, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
    """The scales of a weight's rows [start, stop), ``start`` a multiple of the block's rows."""
    _, tensor = source.stored(spec)
    block, kind = spec.format.block, spec.format.scale
    assert block is not None and kind is not None
    held = source.read_agreed(source.locate(tensor), start // block[0], -(-stop // block[0]))
    return held.view(SCALES[kind])
