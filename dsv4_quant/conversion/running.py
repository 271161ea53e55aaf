"""One run of a conversion in its workspace: what one process does, alone or as one of a team."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from blake3 import blake3

from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
)
from dsv4_quant.conversion.arriving import arriving, vouched
from dsv4_quant.conversion.budget import Budget
from dsv4_quant.conversion.casts import Casts, OnProcessor
from dsv4_quant.conversion.finishing import finish, written
from dsv4_quant.conversion.journal import Resume, Workspace
from dsv4_quant.conversion.moving import Mover, last_uses
from dsv4_quant.conversion.notes import Journal, Notes
from dsv4_quant.conversion.parts import journal_of, part_of
from dsv4_quant.conversion.plan import Plan
from dsv4_quant.conversion.results import Result
from dsv4_quant.conversion.source import (
    Stamps,
    affected,
    held_until_the_end,
    still_holds,
    take_stamps,
)
from dsv4_quant.conversion.stream import Stream
from dsv4_quant.conversion.target import (
    check_empty,
    earlier_output,
    finished,
    plan_key,
    withdraw,
)
from dsv4_quant.durable import sync_folder
from dsv4_quant.errors import (
    MiscomputedError,
    NotANumberError,
    SourceChangedError,
    UsageError,
    ValueNotExactError,
    WriteError,
    some,
)
from dsv4_quant.progress import Progress
from dsv4_quant.team import Team


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the plan, its journal, and how far an earlier run came with it."""

    plan: Plan
    notes: Notes
    before: Journal | None = None
    resume: Resume = field(default_factory=Resume)

    @property
    def is_done(self) -> bool:
        """Whether an earlier run has done all of it."""
        return self.resume.steps == len(self.plan.steps)

    @property
    def bytes_done(self) -> int:
        """Of the output, by an earlier run."""
        return sum(mark for mark, _ in self.resume.prefixes.values())


Outcome = tuple[dict[str, Result], dict[str, str]]
"""The result of every weight, and the SHA-256 of every file."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run in a workspace that is its own; each process of the team has one.

    What only one may do, the first does. What can be done by parts, each does for its own.
    """

    team: Team
    work: Workspace
    plan: Plan
    limits: Budget
    stamps: Stamps
    stated: Mapping[str, str]
    """Digests that the source's own manifest states."""
    progress: Progress
    move: bool = False
    casts: Callable[[], Casts] = OnProcessor
    movers: list[Mover] = field(default_factory=list)

    def all(self, *, overwrite: bool) -> tuple[Manifest, int]:
        """The manifest, and how many bytes were there before."""
        team, work = self.team, self.work
        team.lead(self._check_move)
        if team.lead(lambda: self._is_finished(overwrite=overwrite)):
            if self.move:
                raise UsageError(
                    "OUT is complete already, and --move removes files only while it converts",
                    file=work.out,
                    hint="Every byte and value of it was just checked: you may remove SRC.",
                )
            return read_manifest(work.out / MANIFEST), self.plan.bytes
        count = team.lead(lambda: self._prepare(overwrite=overwrite))
        parts = self._continued(count) if count else None
        if parts is None:
            parts = self._parts(self._most_parts)
        try:
            done = sum(team.gather(lambda: sum(part.bytes_done for part in parts)))
            outcomes = team.gather(lambda: self._stream(parts))
            manifest = team.lead(lambda: self._complete(outcomes))
        except (ValueNotExactError, NotANumberError, MiscomputedError):
            if team.is_first and not work.freed_files:
                work.discard()  # the same command would fail again: nothing to continue
            raise
        finally:
            for part in parts:
                part.notes.close()
        return manifest, done

    def _check_move(self) -> None:
        """Nobody else may touch an unfinished move, which is the only copy of its weights."""
        self.work.check_move(self._signature)
        if self.move and self.work.parts > 1:
            raise UsageError(
                "This conversion was begun by several processes: --move cannot continue it",
                file=self.work.out,
                hint="Give the same command without --move, and remove SRC when it is done.",
            )

    @property
    def _signature(self) -> str:
        """Of this plan and of the values that the source's manifest states."""
        said = [plan_key(self.plan), sorted(self.stated.items())]
        return blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _is_finished(self, *, overwrite: bool) -> bool:
        """Whether OUT is this very output already, in every byte and value."""
        work, plan = self.work, self.plan
        work.forget_freed(plan.source.root)
        if overwrite or work.parts:
            return False
        held = finished(
            work.out,
            plan,
            plan_key(plan),
            workers=self.limits.workers,
            progress=self.progress,
        )
        if held:
            work.discard()
        return held is not None

    def _prepare(self, *, overwrite: bool) -> int:
        """How many parts an earlier run of this conversion left; 0 if there is nothing to continue,
        and the workspace is empty."""
        work, before = self.work, self.work.journal
        if before is not None and before.plan == plan_key(self.plan):
            if work.parts == 1 and (count := self._most_parts) > 1:
                work.divide([journal_of(before, self.plan, n, count) for n in range(count)])
            return work.parts
        if before is not None and not overwrite:
            raise UsageError(
                "OUT holds an unfinished conversion of another checkpoint or to another form",
                file=work.out,
                hint="Finish it with its own command, choose another OUT, or give --overwrite.",
            )
        if before is not None:
            for name in earlier_output(work):  # all of them the unfinished run's
                (work.out / name).unlink(missing_ok=True)
        elif overwrite:
            work.set_aside(earlier_output(work))
        else:
            self._require_empty()
        work.clear()
        return 0

    @property
    def _most_parts(self) -> int:
        """That these processes can work on at once: a file has one writer."""
        return min(self.team.size, len(self.plan.files))

    def _parts(self, count: int) -> list[Part]:
        """The parts that this process works on, of so many."""
        mine = range(self.team.rank, count, self.team.size)
        return [Part(part_of(self.plan, n, count), self.work.notes(n, count)) for n in mine]

    def _continued(self, count: int) -> list[Part] | None:
        """This process's parts where an earlier run left them; None if all begins anew."""
        team, work = self.team, self.work
        self.progress.stage("checking what an earlier run left")
        parts = self._parts(count)

        def check() -> bool:
            parts[:] = map(self._checked, parts)
            return all(part.is_done for part in parts)

        done = team.gather(check)
        team.lead(lambda: None if all(done) else withdraw(work, self.plan))
        held = team.gather(lambda: all(map(self._holds, parts)))
        return parts if team.lead(lambda: all(held) or self._begin_anew()) else None

    def _checked(self, part: Part) -> Part:
        """How far the bytes on the disk are those of a part's journal."""
        before = part.notes.read()
        cuts = () if before is None else before.cuts
        resume = self.work.sound(
            cuts,
            self.plan.request.sums,
            workers=self.limits.workers,
            advance=self.progress.advance,
        )
        self._require_source_of_the_rest(resume)
        return replace(part, before=before, resume=resume)

    def _holds(self, part: Part) -> bool:
        """Whether the source still is what a part was made of."""
        if part.before is None:
            return True
        results, before = part.resume.results, part.before.stamps
        now, done = self._stamps_after(before), part.plan.steps[: part.resume.steps]
        # scales come before their codes; what they were made of was digested with the codes only
        scales = {step.spec.name for step in done if step.out.is_scale} - results.keys()
        if affected(self.plan.source, scales, before, now):
            return False
        return still_holds(
            self.plan.source,
            {name: Result.from_json(result).read for name, result in results.items()},
            before,
            now,
            workers=self.limits.workers,
            progress=self.progress,
        ) and vouched(part.plan, self.work.folder, part.resume.steps)

    def _stamps_after(self, before: Stamps) -> Stamps:
        """Of the source now; files that a move has freed keep theirs."""
        return {**before, **self.stamps} if self.work.freed_files else self.stamps

    def _begin_anew(self) -> bool:
        withdraw(self.work, self.plan)
        self.work.clear()
        return False

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

    def _require_empty(self) -> None:
        try:
            check_empty(self.work.out)
        except UsageError:
            self.work.discard()
            raise

    def _stream(self, parts: list[Part]) -> Outcome:
        """Runs all steps of these parts, one part after the other."""
        self.progress.stage("converting")
        self.progress.total(sum(part.plan.bytes for part in parts))
        self.progress.advance(sum(part.bytes_done for part in parts))
        results: dict[str, Result] = {}
        hashes: dict[str, str] = {}
        for part in parts:
            before, resume = part.before, part.resume
            stamps, cuts = self.stamps, () if before is None else before.cuts[: resume.cuts]
            if before is not None:
                stamps = self._stamps_after(before.stamps)
            part.notes.start(Journal(plan_key(self.plan), stamps, cuts))
            found, sums = self._stream_part(part)
            results |= found
            hashes |= sums
        return results, hashes

    def _stream_part(self, part: Part) -> Outcome:
        mover = (
            Mover(part.plan, self.work, self._signature, part.resume.copied_prefixes())
            if self.move
            else None
        )
        stream = Stream(
            part.plan,
            self.work,
            part.notes,
            part.resume,
            values=self.limits.panel_values,
            progress=self.progress,
            stated=self.stated,
            mover=mover,
            casts=self.casts,
        )
        try:
            with arriving(part.plan, self.work.folder, part.resume.steps):
                stream.run(self.limits.workers)
        finally:
            stream.close()
        hashes = {
            file.name: written.marked[file.size]
            for file, written in zip(part.plan.files, stream.files, strict=True)
        }
        if mover is not None:
            self.movers.append(mover)
        return stream.results, hashes

    def _complete(self, outcomes: list[Outcome]) -> Manifest:
        """Puts everything together and in its place."""
        results = {name: result for found, _ in outcomes for name, result in found.items()}
        hashes = {name: sum for _, found in outcomes for name, sum in found.items()}
        self._confirm_source(results)
        self.progress.stage("finishing")
        manifest = finish(self.work, self.plan, results, hashes)
        for mover in self.movers:
            mover.finish(hashes)
        self.work.drop_replaced()
        self.work.discard(complete=True)
        sync_folder(self.work.out)
        return manifest

    def _written_as_read(self, results: Mapping[str, Result]) -> bool:
        """Whether weights whose files were touched meanwhile are, in the output, what was digested.

        A weight's scales and codes are read at different times. If the source was another one in
        between, the output's values are neither's.
        """
        source = self.plan.source
        if source.arrivals is not None:
            return True
        now = take_stamps(source.root, self.work.freed_headers, self.stamps)
        names = affected(source, results, self.stamps, now)
        if not names:
            return True
        self.progress.stage("reading what was made of files that changed")
        with written(self.plan, self.work) as output:
            try:
                found = digest_tensors(
                    output, names, workers=self.limits.workers, progress=self.progress
                )
            except NotANumberError:
                return False
        return all(found[name] == results[name].digest for name in names)

    def _confirm_source(self, results: Mapping[str, Result]) -> None:
        """Raises SourceChangedError when not all was read from one and the same source."""
        digests = {name: result.read for name, result in results.items()}
        if held_until_the_end(
            self.plan.source,
            digests,
            self.stamps,
            freed=self.work.freed_headers,
            workers=self.limits.workers,
            progress=self.progress,
        ) and self._written_as_read(results):
            return
        withdraw(self.work, self.plan)
        if not self.work.freed_files:
            self.work.discard()
        raise SourceChangedError(
            "The source changed while it was read; what was written is void",
            file=self.plan.source.root,
            hint="Let nothing write to the source, and run the same command again.",
        )
