"""One conversion from beginning to end: validate all, stream, finish.

Until the last moment everything lies in ``OUT/.dsv4-partial``. Then the weight files move to their
places, after them the files that came along, the index and the configs, and last the manifest and
SHA256SUMS. A folder with a manifest is complete; one without is not.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.manifest import (
    MANIFEST,
    SUMS,
    FileRecord,
    Manifest,
    TensorRecord,
    sums,
)
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.requantised import Requantised, by_layer
from dsv4_quant.conversion.arriving import arriving, vouched
from dsv4_quant.conversion.budget import Budget, budget
from dsv4_quant.conversion.certificate import certificates
from dsv4_quant.conversion.configs import small_files
from dsv4_quant.conversion.files import sync_folder, write_durably
from dsv4_quant.conversion.journal import Resume, Workspace, freed_headers
from dsv4_quant.conversion.moving import Mover, check_movable, last_uses, rehearse
from dsv4_quant.conversion.plan import Plan, make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.source import Stamps, held_until_the_end, still_holds, take_stamps
from dsv4_quant.conversion.stream import Result, Stream
from dsv4_quant.conversion.target import (
    check_empty,
    check_room,
    check_separate,
    earlier_output,
    finished,
    plan_key,
    stated_digests,
    withdraw,
)
from dsv4_quant.errors import (
    NotANumberError,
    SourceChangedError,
    UsageError,
    ValueNotExactError,
    WriteError,
    some,
)
from dsv4_quant.progress import NoProgress, Progress

if TYPE_CHECKING:
    from dsv4_quant.hub.arrivals import Arrivals


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a finished conversion did."""

    out: Path
    manifest: Manifest
    bytes: int
    resumed_bytes: int
    seconds: float
    before: Mapping[str, TensorSpec]
    """The source's weights by name: how they were stored."""
    after: Mapping[str, TensorSpec]
    """The output's."""


def convert(
    src: str | Path,
    out: str | Path,
    request: Request,
    *,
    workers: int | None = None,
    max_memory: int = 4 << 30,
    overwrite: bool = False,
    move: bool = False,
    arrivals: Arrivals | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Converts a checkpoint folder. Continues by itself what an earlier run left unfinished.

    With ``move`` each source file is removed once what was made of it is safe (``moving``). Where
    ``src`` holds only headers, ``arrivals`` brings the data (``hub.headers.opened``).

    Where OUT already is this conversion, complete and of the same source, that is checked byte by
    byte and value by value, and nothing is written.

    Raises a Dsv4Error subclass; the output is then either absent or visibly unfinished.
    """
    began = time.monotonic()
    progress = progress or NoProgress()
    target = Path(out)
    freed = freed_headers(target)
    stamps = take_stamps(src) if arrivals is None else arrivals.stamps
    with Checkpoint.open(src, freed=freed, arrivals=arrivals) as source:
        progress.stage("planning")
        plan = make_plan(source, request)
        limits = budget(plan, workers=workers, max_memory=max_memory)
        stated = stated_digests(source)
        check_separate(source.root, target)
        if move:
            check_movable(plan, stated)
        check_room(plan, target, overwrite=overwrite, move=move)
        if move and freed is None:
            rehearse(plan, stated, workers=limits.workers, progress=progress)
        work = Workspace(target)
        try:
            run = _Run(work, plan, limits, stamps, stated, progress, move)
            manifest, done = run.all(overwrite=overwrite)
        except OSError as error:
            raise WriteError(
                f"The system refused: {error.strerror or error}",
                file=error.filename2 or error.filename or target,
                hint="Run the same command again when the cause is gone: it continues from there.",
            ) from None
        finally:
            work.close()
    seconds = time.monotonic() - began
    before, after = plan.source.specs, plan.catalogue.specs
    return ConvertReport(target, manifest, plan.bytes, done, seconds, before, after)


@dataclass(frozen=True, slots=True)
class _Run:
    """One run in a workspace that is its own."""

    work: Workspace
    plan: Plan
    limits: Budget
    stamps: Stamps
    stated: Mapping[str, str]
    """Digests that the source's own manifest states."""
    progress: Progress
    move: bool = False

    def all(self, *, overwrite: bool) -> tuple[Manifest, int]:
        """The manifest, and how many bytes were there before."""
        work, plan, key = self.work, self.plan, plan_key(self.plan)
        work.forget_freed(plan.source.root)
        if not overwrite and work.journal is None:
            held = finished(
                work.out, plan, key, workers=self.limits.workers, progress=self.progress
            )
            if held is not None:
                work.discard()
                return held, plan.bytes
        resume = self._prepare(key, overwrite=overwrite)
        mover = Mover(plan, work, resume.copied_prefixes()) if self.move else None
        results, hashes = self._stream(resume, mover)
        self._confirm_source(results)
        self.progress.stage("finishing")
        manifest = _finish(work, plan, results, hashes)
        if mover is not None:
            mover.finish(hashes)
        work.drop_replaced()
        work.discard(complete=True)
        sync_folder(work.out)
        return manifest, sum(mark for mark, _ in resume.prefixes.values())

    def _prepare(self, key: Mapping[str, Any], *, overwrite: bool) -> Resume:
        """An empty workspace, or the point from which to continue an earlier run."""
        work, before = self.work, self.work.journal
        if before is not None and before.plan == key:
            self.progress.stage("checking what an earlier run left")
            resume = work.sound(before.cuts)
            self._require_source_of_the_rest(resume)
            if resume.steps < len(self.plan.steps):
                withdraw(work, self.plan)
            digests = {name: Result.from_json(r).read for name, r in resume.results.items()}
            now = {**before.stamps, **self.stamps} if work.freed_files else self.stamps
            if self._still_holds(digests, before.stamps, now) and vouched(
                self.plan, work.folder, resume.steps
            ):
                work.resume(before, now, resume.cuts)
                return resume
            withdraw(work, self.plan)
        elif before is not None and not overwrite:
            raise UsageError(
                "OUT holds an unfinished conversion of another checkpoint or to another form",
                file=work.out,
                hint="Finish it with its own command, choose another OUT, or give --overwrite.",
            )
        elif before is not None:
            for name in earlier_output(work):  # all of them the unfinished run's
                (work.out / name).unlink(missing_ok=True)
        elif overwrite:
            work.set_aside(earlier_output(work))
        else:
            self._require_empty()
        work.begin(key, self.stamps)
        return Resume()

    def _require_source_of_the_rest(self, resume: Resume) -> None:
        """Raises WriteError where the output was damaged and its source is gone already."""
        if not self.work.freed_files:
            return
        uses = last_uses(self.plan)
        lost = sorted(name for name in self.work.freed_files if uses[name] > resume.steps)
        if lost:
            raise WriteError(
                f"What was made of {some(lost)} is damaged, and the source was freed",
                file=self.work.folder,
                hint="Restore these source files (fetch them again); the same command continues.",
            )

    def _still_holds(self, digests: Mapping[str, str], before: Stamps, now: Stamps) -> bool:
        return still_holds(
            self.plan.source,
            digests,
            before,
            now,
            workers=self.limits.workers,
            progress=self.progress,
        )

    def _require_empty(self) -> None:
        try:
            check_empty(self.work.out)
        except UsageError:
            self.work.discard()
            raise

    def _stream(
        self, resume: Resume, mover: Mover | None
    ) -> tuple[dict[str, Result], dict[str, str]]:
        """Runs all steps; gives the result of every weight and the SHA-256 of every file."""
        progress, plan = self.progress, self.plan
        progress.stage("converting")
        progress.total(plan.bytes)
        progress.advance(sum(mark for mark, _ in resume.prefixes.values()))
        values = self.limits.panel_values
        try:
            stream = Stream(
                plan,
                self.work,
                resume,
                values=values,
                progress=progress,
                stated=self.stated,
                mover=mover,
            )
            try:
                with arriving(plan, self.work.folder, resume.steps):
                    stream.run(self.limits.workers)
            finally:
                stream.close()
        except (ValueNotExactError, NotANumberError):
            self.work.discard()  # the same command would fail again: nothing to continue
            raise
        hashes = {
            file.name: written.marked[file.size]
            for file, written in zip(plan.files, stream.files, strict=True)
        }
        return stream.results, hashes

    def _confirm_source(self, results: Mapping[str, Result]) -> None:
        """Raises SourceChangedError when not all was read from one and the same source."""
        digests = {name: result.read for name, result in results.items()}
        if held_until_the_end(
            self.plan.source,
            digests,
            self.stamps,
            freed=self.work.freed,
            workers=self.limits.workers,
            progress=self.progress,
        ):
            return
        withdraw(self.work, self.plan)
        self.work.discard()
        raise SourceChangedError(
            "The source changed while it was read; what was written is void",
            file=self.plan.source.root,
            hint="Let nothing write to the source, and run the same command again.",
        )


def _finish(
    work: Workspace, plan: Plan, results: Mapping[str, Result], hashes: Mapping[str, str]
) -> Manifest:
    """Moves everything to its place; manifest and SHA256SUMS last."""
    records = {file.name: FileRecord(file.size, hashes[file.name]) for file in plan.files}
    small = small_files(plan)
    for file in plan.files:
        held = work.locate(file.name)
        if held.stat().st_size != file.size:
            raise OSError(errno.EIO, "Another program has changed the file's size", str(held))
        if held.parent == work.folder:
            held.replace(work.out / file.name)
    for name, content in small.items():
        records[name] = _place(work, name, content)
    manifest = _manifest(plan, results, records)
    records[MANIFEST] = _place(work, MANIFEST, manifest.to_json())
    _place(work, SUMS, sums(records))
    sync_folder(work.out)
    return manifest


def _place(work: Workspace, name: str, content: bytes | Path) -> FileRecord:
    """Writes a small file beside its place, makes it durable, then moves it there."""
    temporary = work.folder / "small"
    record = write_durably(temporary, content)
    place = work.out / name
    if place.parent != work.out:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.resolve().is_relative_to(work.out.resolve()):
            raise OSError(errno.ELOOP, "A symbolic link that leaves OUT", str(place.parent))
    else:
        sync_folder(work.out)  # what came before is durable before this can be seen
    temporary.replace(place)
    if place.parent != work.out:
        sync_folder(place.parent)
    return record


def _manifest(
    plan: Plan, results: Mapping[str, Result], records: Mapping[str, FileRecord]
) -> Manifest:
    key, specs = plan_key(plan), plan.catalogue.specs
    return Manifest(
        tool=key["tool"],
        layout=key["layout"],
        gpus=key["gpus"],
        formats=key["formats"],
        files=dict(records),
        tensors={name: _record(specs[name], results[name]) for name in specs},
        source={
            "layout": plan.source.layout,
            "gpus": plan.source.gpus,
            "identity": key["source"],
        },
        options={
            "experts": plan.request.experts,
            "dense": plan.request.dense,
            "lossy": plan.request.lossy,
        },
        certificate=certificates(plan, results),
        requantised=_requantised(plan, results),
    )


def _record(spec: TensorSpec, result: Result) -> TensorRecord:
    source = None if result.read == result.digest else result.read
    return TensorRecord(str(spec.format), result.digest, source)


def _requantised(plan: Plan, results: Mapping[str, Result]) -> Requantised | None:
    if not plan.is_lossy:
        return None
    costs = {name: result.cost for name, result in results.items() if result.cost is not None}
    layers = by_layer(plan.catalogue.specs.values(), costs)
    return Requantised(plan.request.rule.value, costs, layers)
