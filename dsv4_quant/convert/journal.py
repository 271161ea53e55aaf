"""What is safely on the disk, so that the same command continues after any kind of end.

While a conversion runs, everything lies in ``OUT/.dsv4-partial``: the files, a lock, and the
journal, one JSON object per line. The first line names the plan. Each further line is a *cut*: all
steps before it are done, every file's bytes up to its mark are on the disk (fdatasync came first)
and have that SHA-256, and these are the digests that came out. A cut is believed only if the
bytes still have those hashes: names, sizes and times prove nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant.convert.files import prefix_hashes, sync_folder
from dsv4_quant.errors import BusyError, WriteError

FOLDER = ".dsv4-partial"
_LOCK, _JOURNAL = "lock", "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Cut:
    """A point that a run can continue from. Results are those of the steps since the last cut."""

    steps: int
    files: Mapping[str, tuple[int, str]]
    results: Mapping[str, Any]


@dataclass(slots=True)
class Resume:
    """Where to continue: steps done, hash objects of the sound prefixes, results so far."""

    steps: int = 0
    prefixes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


class Workspace:
    """The folder of an unfinished conversion, held by one run at a time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        try:
            self.made_out = not out.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise WriteError(
                f"The output folder cannot be made: {error.strerror}", file=out
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise BusyError(
                "Another run is writing to this folder",
                file=out,
                hint="Wait for it to end, or give another OUT.",
            ) from None
        self._journal: int | None = None

    @property
    def plan(self) -> dict[str, Any] | None:
        """The first line of the journal, or None when no run got that far."""
        return next(self._lines(), None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The journal's whole lines; the last one may have been cut by a power loss."""
        try:
            content = (self.folder / _JOURNAL).read_bytes()
        except FileNotFoundError:
            return
        for line in content.split(b"\n"):
            try:
                parsed = json.loads(line)
            except ValueError:
                return
            if not isinstance(parsed, dict):
                return
            yield parsed

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Empties the folder and starts a journal for this plan."""
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
        self._open_journal()
        self._append(dict(plan))
        sync_folder(self.folder)

    def resume(self) -> Resume:
        """Finds the last cut whose bytes are sound, and continues the journal from there."""
        lines = list(self._lines())
        cuts = [
            Cut(line["steps"], {n: (m[0], m[1]) for n, m in line["files"].items()}, line["results"])
            for line in lines[1:]
        ]
        found = self._sound(cuts)
        keep = b"".join(_line(line) for line in lines[: 1 + found.count])
        path = self.folder / _JOURNAL
        temporary = path.with_suffix(".new")
        temporary.write_bytes(keep)
        temporary.replace(path)
        self._open_journal()
        return found.resume

    def _sound(self, cuts: list[Cut]) -> _Found:
        marks: dict[str, list[int]] = {}
        for cut in cuts:
            for name, (mark, _) in cut.files.items():
                marks.setdefault(name, []).append(mark)
        hashes = {
            name: prefix_hashes(path, wanted)
            for name, wanted in marks.items()
            if (path := self.locate(name)).is_file()
        }
        resume, count = Resume(), 0
        for cut in cuts:
            prefixes = {}
            for name, (mark, sha256) in cut.files.items():
                held = hashes.get(name, {}).get(mark)
                if mark and (held is None or held.hexdigest() != sha256):
                    return _Found(resume, count)
                prefixes[name] = (mark, held or hashlib.sha256())
            resume = Resume(cut.steps, prefixes, resume.results | dict(cut.results))
            count += 1
        return _Found(resume, count)

    def locate(self, name: str) -> Path:
        """Where a weight file is: here, or already at its place."""
        here = self.folder / name
        return here if here.exists() else self.out / name

    def record(self, cut: Cut) -> None:
        """Appends a cut; on the disk when this returns."""
        self._append({"steps": cut.steps, "files": cut.files, "results": cut.results})

    def _open_journal(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self.folder / _JOURNAL, flags, 0o644)

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._journal is not None
        data = _line(line)
        try:
            if os.write(self._journal, data) != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(self._journal)
        except OSError as error:
            raise WriteError(
                f"The journal cannot be written: {error.strerror}",
                file=self.folder / _JOURNAL,
                hint="Make room and run the same command again.",
            ) from None

    def discard(self) -> None:
        """Removes the folder and all in it, and OUT too if this run made it and it is empty."""
        for entry in self.folder.iterdir():
            entry.unlink()
        self.folder.rmdir()
        if self.made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    def close(self) -> None:
        """Lets another run in."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class _Found:
    resume: Resume
    count: int


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
