"""``--move``: each source shard is freed as soon as everything made of it is safe.

For those whose disk cannot hold source and output. What is freed cannot be read again, so:

- The source must have a manifest, and before the first byte is written all of the source is read
  once: its values must be those of the manifest, and every cast must be possible (``rehearse``).
- A shard is freed after a cut of the journal behind which no step reads it; and not before the
  output's bytes up to that cut have been read back from the disk and hashed again (``Mover``).
- Its header stays in the workspace, so that the same command can plan again and continue. The
  shard itself is gone from the source's folder, which no reader takes for whole any more.

An unfinished move is the only whole copy of its weights: nothing may discard it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_quant.checkpoint.digesting import digest_panels
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.panels import panel_rows
from dsv4_quant.checkpoint.sums import new_hash
from dsv4_quant.conversion.budget import Budget
from dsv4_quant.conversion.casts import OnProcessor
from dsv4_quant.conversion.files import rehash
from dsv4_quant.conversion.journal import Workspace
from dsv4_quant.conversion.notes import Cut
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.plan import COPY, Plan
from dsv4_quant.conversion.source import not_as_stated
from dsv4_quant.durable import sync_folder
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.progress import Progress


def last_uses(plan: Plan) -> dict[str, int]:
    """Per source file, how many steps must be done until none reads it any more."""
    found: dict[str, int] = dict.fromkeys(plan.source.folder.headers, 0)
    for index, ranges in enumerate(plan.reads, 1):
        found.update(dict.fromkeys((held.file for held in ranges), index))
    return found


def peak_bytes(
    cuts: Iterable[tuple[int, Mapping[int, int]]], uses: Mapping[str, int], sizes: Mapping[str, int]
) -> int:
    """The most bytes that source and output take beyond those that the source takes alone.

    Args:
        cuts: steps done and bytes of each output file, as ``plan.cuts`` gives them.
        uses: of ``last_uses``.
        sizes: bytes of the source files.
    """
    peak = freed = 0
    for steps, marks in cuts:
        peak = max(peak, sum(marks.values()) - freed)
        freed = sum(sizes[name] for name, use in uses.items() if use <= steps)
    return peak


def check_movable(plan: Plan, stated: Mapping[str, str]) -> None:
    """Raises UsageError unless the source is one whose shards may be removed one by one."""
    root = plan.source.root
    if plan.source.arrivals is not None:
        raise UsageError("--move frees a folder's files; of an id nothing stays on the disk anyway")
    if missing := [name for name in plan.source.specs if name not in stated]:
        raise UsageError(
            f"--move needs a manifest in SRC that states every weight's digest, and {missing[0]}"
            " is not in one",
            file=root / MANIFEST,
            hint="`dsv4-quant manifest SRC` makes one, if you trust the files.",
        )
    if not os.access(root, os.W_OK):
        raise UsageError("--move removes files from SRC, which may not be written to", file=root)
    for name in plan.source.folder.headers:
        if (root / name).is_symlink():
            raise UsageError(
                "--move would remove a link, which frees nothing",
                file=root / name,
                hint="Give a folder that holds the files themselves.",
            )


def rehearse(plan: Plan, stated: Mapping[str, str], limits: Budget, progress: Progress) -> None:
    """Reads all of the source once and casts it, without writing: so that later nothing can fail.

    Raises what the conversion would: SourceDamagedError where a value is not as stated,
    ValueNotExactError, NotANumberError.
    """
    steps = {step.spec.name: step for step in plan.steps if not step.out.is_scale}
    heights = {
        name: panel_rows(step.spec, (step.out.spec.format,), limits.panel_values)
        for name, step in steps.items()
    }
    progress.stage("checking the source before any of it is freed")
    progress.total(sum(step.out.nbytes for step in steps.values()))

    def onlooker() -> Callable[[str, int, Tensor], None]:
        casts = OnProcessor()

        def see(name: str, first_row: int, panel: Tensor) -> None:
            step = steps[name]
            held = Panel(name, first_row, panel, step.out.spec.format)
            if step.lossy:
                casts.requantise(held, plan.request.rule)
            elif step.operation != COPY:
                casts.weight(step.operation, held, Proof())
            rows = step.spec.matrix[0]
            seen = min(heights[name], rows - first_row)
            progress.advance(step.out.nbytes * seen // rows)

        return see

    def digested(name: str, digest: str) -> None:
        if digest != stated[name]:
            raise not_as_stated(plan.source, name)

    digest_panels(plan.source, heights, onlooker, digested, limits.workers)


@dataclass(slots=True)
class Mover:
    """Frees source files while a stream runs. ``after_cut`` is called in one thread."""

    plan: Plan
    work: Workspace
    signature: str
    """Of this conversion of this source: only it may continue."""
    hashes: dict[str, tuple[int, Any]]
    """Per output file: bytes that the disk was seen to hold, and the hash object of them."""
    _uses: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._uses = last_uses(self.plan)

    def after_cut(self, cut: Cut) -> None:
        """Frees what no later step reads, once all bytes up to the cut are seen on the disk.

        Not after the last cut: the rest waits for the manifest (``finish``).
        """
        if cut.steps == len(self.plan.steps):
            return
        due = [name for name, use in self._uses.items() if use <= cut.steps]
        self._free(cut.files, due)

    def finish(self, hashes: Mapping[str, str]) -> None:
        """Frees what is left; the output is complete, with its manifest. ``hashes`` of files."""
        files = {file.name: (file.size, hashes[file.name]) for file in self.plan.files}
        self._free(files, list(self._uses))

    def _free(self, files: Mapping[str, tuple[int, str]], names: Sequence[str]) -> None:
        root = self.plan.source.root
        if not (due := [name for name in names if (root / name).exists()]):
            return
        for name, (mark, stated) in files.items():
            self._confirm(name, mark, stated)
        self.work.sign_move(self.signature)
        for name in due:
            self.work.keep_header(root / name, self.plan.source.folder.headers[name].data_start)
            self.plan.source.forget(name)
            (root / name).unlink()
            sync_folder(root)

    def _confirm(self, name: str, mark: int, stated: str) -> None:
        """Reads what was written since the last time; raises WriteError if it is not that."""
        path = self.work.locate(name)
        done, held = self.hashes.get(name) or (0, new_hash(self.plan.request.sums))
        rehash(path, done, mark, held)
        if held.hexdigest() != stated:
            raise WriteError(
                "The disk gives back other bytes than were written; nothing more was freed",
                file=path,
                hint="Look after the disk. The same command continues from what is sound.",
            )
        self.hashes[name] = (mark, held)
