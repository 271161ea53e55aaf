"""What is safely on the disk, so that the same command continues after any kind of end.

While a conversion runs, everything lies in ``OUT/.dsv4-partial``: the files, a lock, and the
journal, one JSON object per line, each behind its own hash. The first line names the plan, and the
stamps of the source files that were read. Each further line is a *cut*: all steps before it are
done, every file's bytes up to its mark are on the disk (fdatasync came first) and have that
SHA-256, and these are the digests that came out. A cut is believed only if the bytes still have
those hashes: names, sizes and times prove nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from dsv4_quant.checkpoint.folder import PARTIAL
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.conversion.files import prefix_hashes, sync_folder, write_durably
from dsv4_quant.errors import BusyError, WriteError

FOLDER = PARTIAL
_LOCK, _JOURNAL, _NEW = "lock", "journal", "journal.new"
_REPLACED = "replaced"
FREED = "freed"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Some network filesystems keep none; there it is the user who must not start two runs."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A point that a run can continue from. Results are those of the steps since the last cut."""

    steps: int
    files: Mapping[str, tuple[int, str]]
    results: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """What an earlier run wrote down."""

    plan: Mapping[str, Any]
    stamps: Mapping[str, Any]
    cuts: tuple[Cut, ...] = ()


@dataclass(slots=True)
class Resume:
    """Where to continue: steps done, hash objects of the sound prefixes, results so far."""

    steps: int = 0
    prefixes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    cuts: int = 0

    def copied_prefixes(self) -> dict[str, tuple[int, Any]]:
        """Hash objects that can go on apart from those of the run itself."""
        return {name: (mark, held.copy()) for name, (mark, held) in self.prefixes.items()}


def freed_headers(out: Path) -> Path | None:
    """Where an unfinished move keeps the headers of what it has freed, if it has freed any.

    A run that was cut off while it tidied up behind a complete output is helped to its end.
    """
    folder = out / FOLDER / FREED
    begun = any((out / FOLDER / name).exists() for name in (_JOURNAL, _REPLACED))
    if (out / FOLDER).is_dir() and (out / MANIFEST).exists() and not begun:
        work = Workspace(out)
        try:
            work.discard(complete=True)
        finally:
            work.close()
    return folder if folder.is_dir() else None


class Workspace:
    """The folder of an unfinished conversion, held by one run at a time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        try:
            made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.made_out = out in made
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, f"{FOLDER} is a symbolic link")
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in made:
                sync_folder(path.parent)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WriteError(
                f"The output folder cannot be made: {error.strerror}", file=out
            ) from None
        self._journal: int | None = None
        self.replaced = self.folder / _REPLACED
        self.freed = self.folder / FREED
        if not self._is_ours():
            os.close(self._lock)
            raise BusyError(
                "Another run is writing to this folder",
                file=out,
                hint="Wait for it to end, or give another OUT.",
            )

        for entry in self.folder.iterdir():
            if entry.is_symlink():  # nobody may send our writes elsewhere
                entry.unlink()

    def _is_ours(self) -> bool:
        """Takes the lock; not that of a folder which another run has just removed."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _NO_LOCKS
        try:
            return os.path.samestat(os.fstat(self._lock), (self.folder / _LOCK).stat())
        except FileNotFoundError:
            return False

    @property
    def journal(self) -> Journal | None:
        """What an earlier run wrote, as far as its lines are whole; None if not even the first."""
        lines = self._lines()
        if not lines:
            return None
        first, *cuts = lines
        return Journal(first["plan"], first["stamps"], tuple(map(_parse_cut, cuts)))

    def _lines(self) -> list[dict[str, Any]]:
        """The lines up to the first that a power loss has torn, or that has lost a bit."""
        try:
            content = (self.folder / _JOURNAL).read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for line in content.split(b"\n"):
            check, _, text = line.partition(b" ")
            if check != _check(text):
                break
            found.append(json.loads(text))
        return found

    def begin(self, plan: Mapping[str, Any], stamps: Mapping[str, Any]) -> None:
        """Empties the folder and starts a journal for this plan."""
        self._require_no_freed()
        for entry in self.folder.iterdir():
            if entry.name not in (_LOCK, _REPLACED):
                entry.unlink()
        self._start(Journal(plan, stamps))

    def set_aside(self, names: Iterable[str]) -> None:
        """Moves files of OUT out of the way. Until ``drop_replaced`` they can come back.

        Durable when this returns: else a power loss could bring them back among the new ones.
        """
        touched = {self.out, self.folder}
        for name in names:
            place, aside = self.out / name, self.replaced / name
            if place.is_file() and not aside.exists():
                aside.parent.mkdir(parents=True, exist_ok=True)
                place.replace(aside)
                touched |= {place.parent, aside.parent, self.replaced}
        for folder in touched:
            sync_folder(folder)
        for folder in touched:
            _remove_empty(folder, self.out)

    @property
    def freed_files(self) -> frozenset[str]:
        """Source files that are gone: what was made of them is here and nowhere else."""
        return frozenset(path.name for path in self.freed.glob("*.safetensors"))

    def forget_freed(self, source: Path) -> None:
        """Files that are there after all (a kill came first, or somebody restored them)."""
        for name in self.freed_files:
            if (source / name).exists():
                (self.freed / name).unlink()

    def keep_header(self, path: Path, header_bytes: int) -> None:
        """A file's header and length, its data left out; durable when this returns.

        Enough to plan with, so that a run continues when the file itself is gone.
        """
        self.freed.mkdir(exist_ok=True)
        new = self.freed / _NEW
        with path.open("rb") as file:
            write_durably(new, file.read(header_bytes))
        os.truncate(new, path.stat().st_size)
        new.replace(self.freed / path.name)
        sync_folder(self.freed)
        sync_folder(self.folder)

    def _require_no_freed(self) -> None:
        if self.freed_files:
            raise WriteError(
                "OUT holds weights whose source files were freed: it is their only copy",
                file=self.out,
                hint="Finish that conversion with its own command, then do what you like.",
            )

    def drop_replaced(self) -> None:
        """What was set aside is not needed any more: the new output is complete."""
        if self.replaced.is_dir() and not self.replaced.is_symlink():
            shutil.rmtree(self.replaced)

    def _put_back(self) -> None:
        if not self.replaced.is_dir():
            return
        for aside in sorted(path for path in self.replaced.rglob("*") if path.is_file()):
            place = self.out / aside.relative_to(self.replaced)
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.replace(place)
        shutil.rmtree(self.replaced)

    def resume(self, before: Journal, stamps: Mapping[str, Any], cuts: int) -> None:
        """Continues a journal after its first so many cuts."""
        self._start(Journal(before.plan, stamps, before.cuts[:cuts]))

    def _start(self, journal: Journal) -> None:
        lines = [{"plan": journal.plan, "stamps": journal.stamps}, *map(_cut_line, journal.cuts)]
        write_durably(self.folder / _NEW, b"".join(map(_line, lines)))
        (self.folder / _NEW).replace(self.folder / _JOURNAL)
        sync_folder(self.folder)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self.folder / _JOURNAL, flags)

    def sound(self, cuts: Sequence[Cut]) -> Resume:
        """The last cut whose bytes, and those of all before it, are as the journal says."""
        marks: dict[str, list[int]] = {}
        for cut in cuts:
            for name, (mark, _) in cut.files.items():
                marks.setdefault(name, []).append(mark)
        hashes = {
            name: prefix_hashes(path, wanted)
            for name, wanted in marks.items()
            if (path := self.locate(name)).is_file()
        }
        resume = Resume()
        for cut in cuts:
            prefixes = {}
            for name, (mark, sha256) in cut.files.items():
                held = hashes.get(name, {}).get(mark)
                if held is None or held.hexdigest() != sha256:
                    return resume
                prefixes[name] = (mark, held)
            resume.steps, resume.prefixes = cut.steps, prefixes
            resume.results |= cut.results
            resume.cuts += 1
        return resume

    def locate(self, name: str) -> Path:
        """Where a weight file is or will be written: here, unless it is already at its place."""
        here, place = self.folder / name, self.out / name
        return place if place.exists() and not here.exists() else here

    def record(self, cut: Cut) -> None:
        """Appends a cut; on the disk when this returns."""
        assert self._journal is not None
        data = _line(_cut_line(cut))
        try:
            if os.write(self._journal, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal)
        except OSError as error:
            raise WriteError(
                f"The journal cannot be written: {error.strerror}",
                file=self.folder / _JOURNAL,
                hint="Make room and run the same command again.",
            ) from None

    def discard(self, *, complete: bool = False) -> None:
        """Removes the folder and all in it, and OUT too if this run made it and it is empty.

        What was set aside and is still there goes back to its place. Raises WriteError for a move
        that is not ``complete``: nobody has what it holds.
        """
        if not complete:
            self._require_no_freed()
        self._put_back()
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.freed, ignore_errors=True)
        for entry in self.folder.iterdir():
            entry.unlink()
        self.folder.rmdir()
        if self.made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    def close(self) -> None:
        """Lets another run in."""
        journal, self._journal = self._journal, None
        if journal is not None:
            os.close(journal)
        os.close(self._lock)


def _remove_empty(folder: Path, out: Path) -> None:
    while folder != out and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _cut_line(cut: Cut) -> dict[str, Any]:
    return {"steps": cut.steps, "files": cut.files, "results": cut.results}


def _parse_cut(line: Mapping[str, Any]) -> Cut:
    files = {name: (mark, sha256) for name, (mark, sha256) in line["files"].items()}
    return Cut(line["steps"], files, line["results"])


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return _check(text) + b" " + text + b"\n"


def _check(text: bytes) -> bytes:
    return blake3(text).hexdigest().encode()
