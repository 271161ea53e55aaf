"""What is safely on the disk, so that the same command continues after any kind of end.

While a conversion runs, everything lies in ``OUT/.dsv4-partial``: the files, a lock, and the
journal, one JSON object per line, each behind its own hash. The first line names the plan, and the
stamps of the source files that were read. Each further line is a *cut*: all steps before it are
done, every file's bytes up to its mark are on the disk (fdatasync came first) and have that
SHA-256, and these are the digests that came out. A cut is believed only if the bytes still have
those hashes: names, sizes and times prove nothing.

Several processes divide a plan into parts and keep a journal for each; they hold the lock together.
Whoever continues, be it more or fewer of them, continues these parts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant.checkpoint.folder import PARTIAL
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.panels import work_in_threads
from dsv4_quant.checkpoint.sums import FileHash, HashKind
from dsv4_quant.conversion.files import NEW, prefix_hashes, replace_durably, write_durably
from dsv4_quant.conversion.notes import Cut, Journal, Notes
from dsv4_quant.durable import sync_folder
from dsv4_quant.errors import BusyError, WriteError

FOLDER = PARTIAL
_LOCK, _JOURNAL = "lock", "journal"
_JOURNALS = re.compile(rf"{_JOURNAL}(?:-([0-9]+)-of-([0-9]+))?")
_REPLACED = "replaced"
FREED, _SIGNATURE = "freed", "signature"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Some network filesystems keep none; there it is the user who must not start two runs."""


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
    partial = out / FOLDER
    begun = (partial / _REPLACED).exists() or _parts_in(partial)
    if partial.is_dir() and (out / MANIFEST).exists() and not begun:
        work = Workspace(out)
        try:
            work.discard(complete=True)
        finally:
            work.close()
    return folder if folder.is_dir() else None


def _journals(folder: Path) -> list[Path]:
    """All that lie there; the first part's comes first."""
    return sorted(p for p in folder.glob(f"{_JOURNAL}*") if _JOURNALS.fullmatch(p.name))


def _parts_in(folder: Path) -> int:
    """How many parts there are by the first one's journal; 0 without it.

    One journal of all is believed before any of parts: it goes when all those have been written.
    """
    first = [path.name for path in _journals(folder)]
    found = _JOURNALS.fullmatch(first[0]) if first else None
    if found is None or found[1] not in (None, "0"):
        return 0
    return int(found[2] or 1)


class Workspace:
    """The folder of an unfinished conversion, held by one run at a time.

    The processes of a run hold it together: the first opens it (``share``), the others ``join``.
    """

    def __init__(self, out: Path, *, join: bool = False) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.replaced = self.folder / _REPLACED
        self.freed = self.folder / FREED
        self.made_out = False
        if join:
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            self.share()
            return
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
        if not self._is_ours():
            os.close(self._lock)
            raise _busy(out)

        for entry in self.folder.iterdir():
            if entry.is_symlink():  # nobody may send our writes elsewhere
                entry.unlink()

    def share(self) -> None:
        """Lets other processes of this run in, but no other run. Raises BusyError."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _busy(self.out) from None

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
    def parts(self) -> int:
        """Into how many parts an earlier run divided its plan; 0 if it left no journal."""
        return _parts_in(self.folder)

    def notes(self, number: int = 0, count: int = 1) -> Notes:
        """The journal of one of so many parts."""
        return Notes(self.folder / (f"{_JOURNAL}-{number}-of-{count}" if count > 1 else _JOURNAL))

    def divide(self, journals: Sequence[Journal]) -> None:
        """Puts journals of parts in the place of the one of all; durable when this returns."""
        for number, journal in enumerate(journals):
            notes = self.notes(number, len(journals))
            notes.start(journal)
            notes.close()
        (self.folder / _JOURNAL).unlink()
        sync_folder(self.folder)

    @property
    def journal(self) -> Journal | None:
        """What an earlier run wrote; of several parts, the first that wrote anything."""
        for number in range(count := self.parts):
            if (found := self.notes(number, count).read()) is not None:
                return found
        return None

    def clear(self) -> None:
        """Empties the folder, for another plan."""
        self._require_no_freed()
        for entry in self.folder.iterdir():
            if entry.name not in (_LOCK, _REPLACED):
                entry.unlink()

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

    @property
    def freed_headers(self) -> Path | None:
        """Where the headers of these files are, if there is one."""
        return self.freed if self.freed_files else None

    def sign_move(self, signature: str) -> None:
        """Says which conversion of which source frees files; durable before the first is gone."""
        self.freed.mkdir(exist_ok=True)
        if not (self.freed / _SIGNATURE).exists():
            replace_durably(self.freed / _SIGNATURE, signature.encode())
            sync_folder(self.folder)

    def check_move(self, signature: str) -> None:
        """Raises WriteError if this is another run than the one that has freed files."""
        path = self.freed / _SIGNATURE
        if self.freed_files and not (path.is_file() and path.read_text() == signature):
            self._require_no_freed()

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
        new = self.freed / f"header{NEW}"
        with path.open("rb") as file:
            write_durably(new, file.read(header_bytes))
        with new.open("r+b") as file:
            file.truncate(path.stat().st_size)
            os.fsync(file.fileno())
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

    def sound(
        self,
        cuts: Sequence[Cut],
        kind: HashKind = "sha256",
        *,
        workers: int = 1,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Resume:
        """The last cut whose bytes, and those of all before it, are as the journal says.

        ``kind`` is the journal's hash; ``advance`` is told of bytes that were read.
        """
        marks: dict[str, list[int]] = {}
        for cut in cuts:
            for name, (mark, _) in cut.files.items():
                marks.setdefault(name, []).append(mark)
        hashes: dict[str, dict[int, FileHash]] = {}

        def hash_one(name: str) -> None:
            if (path := self.locate(name)).is_file():
                hashes[name] = prefix_hashes(path, marks[name], kind, advance)

        work_in_threads(marks, lambda: hash_one, workers)
        resume = Resume()
        for cut in cuts:
            prefixes = {}
            for name, (mark, stated) in cut.files.items():
                held = hashes.get(name, {}).get(mark)
                if held is None or held.hexdigest() != stated:
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

    def discard(self, *, complete: bool = False) -> None:
        """Removes the folder and all in it, and OUT too if this run made it and it is empty.

        What was set aside and is still there goes back to its place. Raises WriteError for a move
        that is not ``complete``: nobody has what it holds.
        """
        if not complete:
            self._require_no_freed()
        self._put_back()
        for journal in _journals(self.folder):
            journal.unlink()
        shutil.rmtree(self.freed, ignore_errors=True)
        for entry in self.folder.iterdir():
            entry.unlink()
        self.folder.rmdir()
        if self.made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    def close(self) -> None:
        """Lets another run in."""
        os.close(self._lock)


def _busy(out: Path) -> BusyError:
    return BusyError(
        "Another run is writing to this folder",
        file=out,
        hint="Wait for it to end, or give another OUT.",
    )


def _remove_empty(folder: Path, out: Path) -> None:
    while folder != out and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
