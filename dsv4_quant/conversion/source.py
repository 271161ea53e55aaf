"""Whether the source still holds what was read from it: by its stamps, in doubt by its content.

A file's stamp is its size, times and inode: while it stays the same, nobody wrote to the file. A
stamp that has changed proves nothing, the file may have come back from a backup. Then the weights
that were read from it are digested again, and must be what they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.sidecars import identity
from dsv4_quant.errors import (
    NotANumberError,
    SourceChangedError,
    SourceDamagedError,
    UnreadableError,
)
from dsv4_quant.progress import Progress

Stamps = Mapping[str, list[Any]]


def take_stamps(
    root: str | Path, freed: Path | None = None, before: Stamps | None = None
) -> Stamps:
    """Of all weight files of a folder; take them before their headers are read.

    Those that a move has freed keep the stamp that they had ``before``.
    """
    names = [path.name for path in freed.glob("*.safetensors")] if freed else []
    found = {name: before[name] for name in names if before and name in before}
    with suppress(OSError), os.scandir(root) as entries:  # opening it will tell what is wrong
        for entry in entries:
            if entry.name.endswith(".safetensors"):
                stat = entry.stat()
                found[entry.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found


def still_holds(
    source: Checkpoint,
    digests: Mapping[str, str],
    before: Stamps,
    now: Stamps,
    *,
    workers: int,
    progress: Progress,
) -> bool:
    """Whether the weights of these digests are still what they were when they were read."""
    if source.arrivals is not None:
        return not _changed(before, now)  # fetching everything again is as good as beginning anew
    names = affected(source, digests, before, now)
    if not names:
        return True
    progress.stage("reading again what changed in the source")
    try:
        found = digest_tensors(source, names, workers=workers, progress=progress)
    except NotANumberError:
        return False
    return all(found[name] == digests[name] for name in names)


def affected(source: Checkpoint, names: Iterable[str], before: Stamps, now: Stamps) -> list[str]:
    """Those of the weights that have bytes in a file whose stamp has changed."""
    changed = _changed(before, now)
    return [name for name in names if changed and changed & _files_of(source, name)]


def _changed(before: Stamps, now: Stamps) -> set[str]:
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def _files_of(source: Checkpoint, name: str) -> set[str]:
    stored = source.stored(source.specs[name])
    return {extent.file for tensor in stored for extent in source.locate(tensor).extents}


def held_until_the_end(
    source: Checkpoint,
    digests: Mapping[str, str],
    before: Stamps,
    *,
    freed: Path | None = None,
    workers: int,
    progress: Progress,
) -> bool:
    """Whether a source that has been read to its end is still what it was at the beginning.

    Files whose headers lie in ``freed`` were taken away by a move, and are not missed. Raises
    SourceChangedError when it cannot be opened any more, as when a file has vanished.
    """
    if source.arrivals is not None:
        return True  # every file has passed with its published hash, or ``arriving`` had raised
    now = take_stamps(source.root, freed, before)
    if now == before:
        return True
    try:
        with Checkpoint.open(source.root, freed=freed) as again:
            same = identity(again.folder, again.config) == identity(source.folder, source.config)
            return same and still_holds(
                again, digests, before, now, workers=workers, progress=progress
            )
    except UnreadableError as error:
        raise SourceChangedError(
            f"The source changed while it was read: {error.what}",
            file=error.file,
            hint="Restore it and run the same command again: it continues.",
        ) from None


def not_as_stated(source: Checkpoint, name: str) -> SourceDamagedError:
    """The error for a weight that is not what the source's own manifest says."""
    return SourceDamagedError(
        f"The source's values are not those of its own {MANIFEST}",
        file=source.root,
        tensor=name,
        hint="The file is damaged or was edited: `dsv4-quant verify` says more. Restore it and run"
        " the same command again; or, if you meant the edit, make a new manifest.",
    )
