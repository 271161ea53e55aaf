"""The folder that a synthetic checkpoint is written to: whole, or not there."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from dsv4_quant.errors import DiskSpaceError, UsageError, WriteError

_DONT_CACHE = 0x80
"""RWF_DONTCACHE: the kernel starts writing at once and drops the pages after (Linux 6.14)."""


class NewFolder:
    """A new folder: files appear whole, under their names, or not at all."""

    def __init__(self, root: Path, size: int) -> None:
        self._root, self._size = root, size
        self._made: list[Path] = []

    def __enter__(self) -> NewFolder:
        try:
            self._is_new = not self._root.exists()
            if not self._is_new and (not self._root.is_dir() or any(self._root.iterdir())):
                raise UsageError(
                    "The output is not an empty folder",
                    file=self._root,
                    hint="Name another one, or remove it first.",
                )
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(error, self._root) from error
        free = shutil.disk_usage(self._root).free
        if free < self._size:
            self._discard()
            raise DiskSpaceError(
                f"The checkpoint needs {self._size:,} bytes, the disk has {free:,} left",
                file=self._root,
                hint="Make room, or make fewer --layers.",
            )
        return self

    def begin(self, name: str) -> Path:
        """Where a file is to be written until it is whole."""
        path = self._root / f"{name}.partial"
        self._made.append(path)
        return path

    def finish(self, name: str) -> None:
        """The file is whole and on disk: it gets its name."""
        path = self._root / name
        self._made.append(path)
        (self._root / f"{name}.partial").replace(path)

    def write(self, name: str, content: bytes) -> None:
        """A small file at once."""
        with self.begin(name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.finish(name)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._discard()
        if isinstance(error, OSError):
            raise _refused(error, self._root) from error

    def _discard(self) -> None:
        for path in self._made:
            path.unlink(missing_ok=True)
        if self._is_new:
            with suppress(OSError):
                self._root.rmdir()


def _refused(error: OSError, root: Path) -> WriteError:
    return WriteError(f"Writing failed: {error.strerror}", file=error.filename or root)


def write_all(fd: int, data: memoryview, at: int) -> None:
    """Writes all of the data at an offset of a file, past the page cache where that works."""
    while data:
        try:
            done = os.pwritev(fd, [data], at, _DONT_CACHE)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            done = os.pwritev(fd, [data], at)  # an older kernel, or another filesystem
        data, at = data[done:], at + done
