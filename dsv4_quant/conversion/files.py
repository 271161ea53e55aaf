"""Output files: preallocated, written in ranges from any thread, hashed in order as they grow.

A hash needs a file's bytes from first to last, while threads finish their panels in any order. A
panel that comes early waits in memory (the caller keeps that within bounds) until those before it
have been hashed; whichever thread closes the gap hashes all that is waiting.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dsv4_quant.checkpoint.manifest import FileRecord
from dsv4_quant.checkpoint.sums import FileHash, HashKind, new_hash
from dsv4_quant.durable import sync_folder
from dsv4_quant.errors import SourceChangedError, WriteError

NEW = ".new"
"""Behind the name of a file that is not yet complete."""

_DONT_CACHE = 0x80  # RWF_DONTCACHE: start writing back at once, then drop the pages (Linux 6.14)
_LIBC = ctypes.CDLL(None, use_errno=True)


class OutputFile:
    """One file being written. Bytes [0, start) are there already when a run is resumed."""

    def __init__(
        self,
        path: Path,
        size: int,
        marks: Iterable[int],
        *,
        kind: HashKind = "sha256",
        reserve: bool = True,
    ) -> None:
        self.path = path
        self.size = size
        self.hashed = 0
        self.marked: dict[int, str] = {}
        """Hash of the first so many bytes, at every mark that has been reached."""
        self._marks = frozenset(marks) | {size}
        self._sum = new_hash(kind)
        self._waiting: dict[int, memoryview] = {}
        self._is_hashing = False
        self._lock = threading.Lock()
        self._flags = _DONT_CACHE
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, size)
            if reserve:
                _allocate(self._fd, size)
        except OSError as error:
            self.close()
            raise _failed(error, path) from None

    def continue_from(self, start: int, sum: FileHash) -> None:
        """Takes the first ``start`` bytes as written; ``sum`` has hashed them."""
        self.hashed, self._sum = start, sum
        self.marked[start] = sum.hexdigest()

    def write(self, offset: int, data: memoryview) -> int:
        """Writes, and hashes what can be; returns by how many bytes the hash has advanced.

        The caller must not change ``data`` afterwards: it may wait to be hashed.
        """
        try:
            self._write_all(offset, data)
        except OSError as error:
            raise _failed(error, self.path) from None
        return self._hash(offset, data)

    def _write_all(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwritev(self._fd, [data[done:]], offset + done, self._flags)
            except OSError:
                if not self._flags:
                    raise
                self._flags = 0  # an older kernel or another filesystem: a plain write

    def _hash(self, offset: int, data: memoryview) -> int:
        advanced = 0
        with self._lock:
            self._waiting[offset] = data
            if self._is_hashing:
                return 0
            self._is_hashing = True
        while True:
            with self._lock:
                ready = self._waiting.pop(self.hashed, None)
                if ready is None:
                    self._is_hashing = False
                    return advanced
            self._sum.update(ready)
            end = self.hashed + len(ready)
            if end in self._marks:
                self.marked[end] = self._sum.copy().hexdigest()
            self.hashed = end  # after its mark: whoever sees the one finds the other
            advanced += len(ready)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _failed(error, self.path) from None

    def close(self) -> None:
        """Closes the descriptor; a write that comes too late cannot hit another file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _allocate(fd: int, size: int) -> None:
    """Reserves the blocks, where the filesystem can; ENOSPC is found here, not half-way.

    Not os.posix_fallocate: where the filesystem cannot, it writes a byte to every block.
    """
    if size and _LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        error = ctypes.get_errno()
        if error in (28, 122, 27):  # ENOSPC, EDQUOT, EFBIG
            raise OSError(error, os.strerror(error))


def _failed(error: OSError, path: Path) -> WriteError:
    full = error.errno in (28, 122)
    return WriteError(
        f"Writing failed: {error.strerror}",
        file=path,
        hint="Make room and run the same command again: it continues where this one stopped."
        if full
        else "Run the same command again when the cause is gone: it continues from there.",
    )


def write_durably(path: Path, content: bytes | Path, kind: HashKind = "sha256") -> FileRecord:
    """A small file, made from bytes or copied, on the disk when this returns."""
    sum, size = new_hash(kind), 0
    try:
        with path.open("wb") as file:
            for data in _chunks(content):
                file.write(data)
                sum.update(data)
                size += len(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _failed(error, path) from None
    return FileRecord.of(size, kind, sum.hexdigest())


def replace_durably(path: Path, content: bytes) -> None:
    """A small file in the place of what is there: the one or the other, whatever happens."""
    new = path.with_name(path.name + NEW)
    write_durably(new, content)
    new.replace(path)
    sync_folder(path.parent)


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    try:
        with content.open("rb") as file:
            while data := file.read(1 << 20):
                yield data
    except OSError as error:
        raise SourceChangedError(f"Cannot be read: {error.strerror}", file=content) from None


def rehash(path: Path, start: int, stop: int, sum: FileHash) -> None:
    """Goes on hashing with a file's bytes [start, stop), read from the disk and not from memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        while start < stop and (data := file.read(min(1 << 22, stop - start))):
            sum.update(data)
            start += len(data)


def prefix_hashes(
    path: Path,
    marks: Iterable[int],
    kind: HashKind = "sha256",
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, FileHash]:
    """A hash object for each prefix of those lengths, as far as the file goes."""
    found: dict[int, FileHash] = {}
    sum, at = new_hash(kind), 0
    with path.open("rb") as file:
        for mark in sorted(set(marks)):
            while at < mark:
                data = file.read(min(1 << 22, mark - at))
                if not data:
                    return found
                sum.update(data)
                at += len(data)
                advance(len(data))
            found[mark] = sum.copy()
    return found
