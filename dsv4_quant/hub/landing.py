"""A file that bytes land in as they arrive: of the true size, holes where nothing is.

What has served is given back by punching holes. Where a filesystem cannot (NFS before 4.2), the
file is emptied as soon as nothing in it is in use any more.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv4_quant.errors import DiskSpaceError, WriteError
from dsv4_quant.hub.schedule import BLOCK, Span, without

_LIBC = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_READ_BYTES = 1 << 20


class Landing:
    """One file; ``was_there``: an earlier run left it, so what it holds may be of use."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(path, flags, 0o644)
            self.was_there = os.fstat(self._fd).st_size == size
            if not self.was_there:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, size)
        except OSError as error:
            raise _failed(error, path) from None

    def write(self, offset: int, data: bytes, kept: Iterable[Span]) -> None:
        """Writes what lies outside ``kept``: bytes there are in use, and right."""
        view = memoryview(data)
        try:
            for start, stop in without([(offset, offset + len(data))], kept):
                while start < stop:
                    start += os.pwrite(self._fd, view[start - offset : stop - offset], start)
        except OSError as error:
            raise _failed(error, self.path) from None

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills a buffer. Raises WriteError when another program has cut the file."""
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if not count:
                raise WriteError("Another program has cut the file short", file=self.path)
            done += count

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in pieces."""
        while start < stop:
            piece = bytearray(min(_READ_BYTES, stop - start))
            self.read_into(start, memoryview(piece))
            yield bytes(piece)
            start += len(piece)

    def filled(self) -> int:
        """Up to where the file has no hole, as far as the filesystem can tell."""
        try:
            return os.lseek(self._fd, 0, os.SEEK_HOLE) if self.size else 0
        except OSError:
            return 0

    def free(self, spans: Iterable[Span], kept: Iterable[Span]) -> None:
        """Gives back the space of ``spans`` outside ``kept``."""
        kept = list(kept)
        for start, stop in without(spans, kept):
            beyond = -stop % BLOCK if stop == self.size else 0  # the last block is only begun
            length = ctypes.c_int64(stop + beyond - start)
            mode = _PUNCH_HOLE | _KEEP_SIZE
            if _LIBC.fallocate(self._fd, mode, ctypes.c_int64(start), length):
                self._empty(kept)
                return

    def _empty(self, kept: list[Span]) -> None:
        if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise _failed(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())), self.path)
        if not kept:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self.size)

    def close(self) -> None:
        """Closes the file. Nothing may use it any more."""
        os.close(self._fd)


def _failed(error: OSError, path: Path) -> WriteError | DiskSpaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            "The disk is full: what arrives from the hub finds no room",
            file=path,
            hint="Make room and run the same command again: it continues where this one stopped.",
        )
    return WriteError(
        f"What arrives from the hub cannot be kept: {error.strerror}",
        file=path,
        hint="Run the same command again when the cause is gone: it continues from there.",
    )
