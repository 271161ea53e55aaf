"""One reader for both layouts: whole logical tensors, or ranges of their rows.

Rank files are stitched together here and nowhere else. Reads are plain ``pread`` calls, so they
can run on many threads, leave no mapped memory behind, and notice a file that was cut short.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import Catalogue, Layout, StoredTensor, TensorSpec, stored
from dsv4_quant.checkpoint.ahead import will_read
from dsv4_quant.checkpoint.folder import INDEX, Folder, check_inside, survey
from dsv4_quant.checkpoint.matching import match, placed
from dsv4_quant.checkpoint.placement import geometry
from dsv4_quant.config import ModelConfig, read_config
from dsv4_quant.errors import Dsv4Error, SourceChangedError, SourceDamagedError, UnreadableError
from dsv4_quant.formats.blocks import CODES, SCALES, Tensor

if TYPE_CHECKING:
    from dsv4_quant.hub.arrivals import Arrivals

CONFIGS = ("config.json", "inference/config.json")

Bytes = NDArray[np.uint8]

NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
"""What the system says when too many files are open: nothing about the file that comes next."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one piece of a stored tensor lies: a rectangle of its bytes in one file."""

    file: str
    offset: int
    row: int
    rows: int
    column: int
    row_bytes: int

    def rows_at(self, start: int, stop: int) -> tuple[int, int]:
        """Of the tensor's rows [start, stop) those that lie here: where in the file, how many."""
        first, last = max(start, self.row), min(stop, self.row + self.rows)
        return self.offset + (first - self.row) * self.row_bytes, max(last - first, 0)


@dataclass(frozen=True, slots=True)
class Located:
    """A stored tensor and its extents; ``copies`` are the other ranks' identical ones."""

    tensor: StoredTensor
    rows: int
    row_bytes: int
    extents: tuple[Extent, ...]
    copies: tuple[Extent, ...] = ()


class Checkpoint:
    """A checkpoint whose names, shapes and formats are all as its config implies."""

    def __init__(self, folder: Folder, config: ModelConfig, catalogue: Catalogue) -> None:
        self.root = folder.root
        self.layout: Layout = folder.layout
        self.gpus = folder.gpus
        self.folder = folder
        self.config = config
        self.catalogue = catalogue
        self.arrivals: Arrivals | None = None
        """What brings the data, where the folder holds only headers."""
        self._files = _OpenFiles(folder)

    @classmethod
    def open(
        cls,
        root: str | Path,
        config: Path | None = None,
        freed: Path | None = None,
        arrivals: Arrivals | None = None,
    ) -> Checkpoint:
        """Reads config, index and headers. Raises UnreadableError if anything is wrong.

        ``freed`` holds the headers of files that a move has freed: they can be planned with, not
        read. ``arrivals`` brings the data where the folder holds only headers.
        """
        folder, parsed, catalogue = inspect_folder(Path(root), config, freed)
        if folder.problems:
            raise summary(folder)
        assert parsed is not None and catalogue is not None
        opened = cls(folder, parsed, catalogue)
        opened.arrivals = arrivals
        return opened

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every logical weight by name, in the model's order."""
        return self.catalogue.specs

    def stored(self, spec: TensorSpec) -> tuple[StoredTensor, ...]:
        """A weight's tensors on disk: codes, and scales if it is quantised."""
        return stored(spec, self.layout)

    def locate(self, tensor: StoredTensor) -> Located:
        """Where a stored tensor's bytes are."""
        extents = []
        for piece in placed(tensor, self.catalogue, self.folder):
            if self.layout == "mp":
                file = f"model{piece.rank}-mp{self.gpus}.safetensors"
            else:
                file = self._shard_of(tensor.name)
            header = self.folder.headers[file]
            offset = header.data_start + header.entries[tensor.name].start
            extents.append(
                Extent(file, offset, piece.row, piece.rows, piece.column, piece.row_bytes)
            )
        rows, row_bytes = geometry(tensor)
        whole = 1 if tensor.spec.split is None else len(extents)
        return Located(tensor, rows, row_bytes, tuple(extents[:whole]), tuple(extents[whole:]))

    def _shard_of(self, name: str) -> str:
        if self.folder.index:
            return self.folder.index[name]
        return next(iter(self.folder.headers))

    def read(self, name: str) -> Tensor:
        """A whole logical weight."""
        return self.read_rows(name, 0, self.specs[name].matrix[0])

    def read_rows(self, name: str, start: int, stop: int, *, copies: bool = False) -> Tensor:
        """Rows [start, stop) of a weight's matrix view; a vector is one row.

        For a quantised weight ``start`` must be a multiple of its block's rows; the scales
        returned are those of the rows' blocks. Raises ValueError for other rows than these. With
        ``copies`` every rank's copy is read too, and SourceDamagedError raised where one differs.
        """
        spec = self.specs[name]
        b = spec.format.block[0] if spec.format.block else 1
        if not 0 <= start <= stop <= spec.matrix[0] or start % b:
            raise ValueError(
                f"{name} {spec.shape} has no rows [{start}, {stop}) that start a block"
            )
        weight, *scale = self.stored(spec)
        read = self.read_agreed if copies else self.read_bytes
        codes = read(self.locate(weight), start, stop).view(CODES[spec.format.kind])
        whole = (start, stop) == (0, spec.matrix[0])
        shape = spec.shape if whole else (stop - start, spec.matrix[1])
        if not scale:
            return Tensor(spec.format, shape, codes.reshape(shape))
        assert spec.format.scale is not None
        held = read(self.locate(scale[0]), start // b, -(-stop // b))
        return Tensor(spec.format, shape, codes, held.view(SCALES[spec.format.scale]))

    def read_agreed(self, located: Located, start: int, stop: int) -> Bytes:
        """``read_bytes``, if all ranks that hold a copy hold the same: else SourceDamagedError."""
        held = self.read_bytes(located, start, stop)
        copy = np.empty_like(held) if located.copies else held
        for extent in located.copies:
            self.read_into(extent.file, extent.offset + start * extent.row_bytes, copy)
            if not np.array_equal(copy, held):
                raise SourceDamagedError(
                    f"Another copy than that of {located.extents[0].file}: the ranks would compute"
                    " different things",
                    file=self.root / extent.file,
                    tensor=located.tensor.name,
                    hint="One of the two files is damaged; `dsv4-quant verify` says more.",
                )
        return held

    def announce(
        self, name: str, start: int, stop: int, *, codes: bool = True, copies: bool = False
    ) -> int:
        """Tells the disk that ``read_rows`` will come for these rows, or without ``codes`` for
        their scales alone; how many bytes that are."""
        weight, *scale = self.stored(self.specs[name])
        b = self.specs[name].format.block
        wanted = [(weight, start, stop)] if codes else []
        wanted += [(held, start // b[0], -(-stop // b[0])) for held in scale if b is not None]
        count = 0
        for tensor, first, last in wanted:
            located = self.locate(tensor)
            for extent in (*located.extents, *(located.copies if copies else ())):
                offset, rows = extent.rows_at(first, last)
                count += rows * extent.row_bytes
                if self.arrivals is None and rows:
                    with suppress(OSError, SourceChangedError):  # reading will find the words
                        fd = self._files.descriptor(extent.file)
                        will_read(fd, offset, offset + rows * extent.row_bytes)
        return count

    def read_bytes(
        self, located: Located, start: int, stop: int, out: Bytes | None = None
    ) -> Bytes:
        """Bytes ``[stop - start, row_bytes]`` of rows of a stored tensor, stitched from ranks."""
        width = located.row_bytes
        buffer = np.empty((stop - start, width), np.uint8) if out is None else out
        for extent in located.extents:
            offset, rows = extent.rows_at(start, stop)
            if not rows:
                continue
            first = max(start, extent.row) - start
            part = buffer[first : first + rows]
            if extent.row_bytes == width:
                self.read_into(extent.file, offset, part)
            else:
                slices = np.empty((rows, extent.row_bytes), np.uint8)
                self.read_into(extent.file, offset, slices)
                part[:, extent.column : extent.column + extent.row_bytes] = slices
        return buffer

    def read_into(self, file: str, offset: int, out: NDArray[Any]) -> None:
        """Fills a contiguous array from a file. Raises SourceChangedError at a short read, and
        OSError where no more files can be opened."""
        view = out.data.cast("B") if out.size else memoryview(b"")
        if self.arrivals is not None:
            self.arrivals.read_into(file, offset, view)
            return
        done = 0
        try:
            fd = self._files.descriptor(file)
            while done < len(view):
                count = os.preadv(fd, [view[done:]], offset + done)
                if count == 0:
                    raise SourceChangedError(
                        "The file became shorter while it was read",
                        file=self.root / file,
                        hint="Restore it and run the same command again.",
                    )
                done += count
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
            raise SourceChangedError(
                f"The file cannot be read any more: {error.strerror}",
                file=self.root / file,
                hint="Restore it and run the same command again.",
            ) from None

    def halt(self) -> None:
        """Ends the waiting of all who read what has not arrived: the work has failed elsewhere."""
        if self.arrivals is not None:
            self.arrivals.halt()

    def forget(self, file: str) -> None:
        """Closes a file that will not be read again: a removed file takes room while it is open."""
        self._files.forget(file)

    def close(self) -> None:
        """Closes the files that were opened for reading."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inspect_folder(
    root: Path, config: Path | None = None, freed: Path | None = None
) -> tuple[Folder, ModelConfig | None, Catalogue | None]:
    """Everything that headers and config can tell, with every problem listed in the folder."""
    folder = survey(root, freed)
    path = config or next((root / c for c in CONFIGS if (root / c).exists()), root / CONFIGS[0])
    try:
        if config is None:
            check_inside(root, path)
        parsed = read_config(path)
    except Dsv4Error as error:
        folder.problems.append(error)
        return folder, None, None
    return folder, parsed, match(folder, parsed, path)


def summary(folder: Folder) -> Dsv4Error:
    """One error for all problems of a folder: the first, and how many more there are."""
    first, more = folder.problems[0], len(folder.problems) - 1
    if not more:
        return first
    hint = f"{more} more problem{'s' if more > 1 else ''}; `dsv4-quant verify` lists all."
    kind = type(first) if isinstance(first, UnreadableError) else UnreadableError
    joined = f"{first.hint} {hint}" if first.hint else hint
    return kind(first.what, file=first.file, tensor=first.tensor, hint=joined)


class _OpenFiles:
    """Descriptors of the source files, opened once and shared by all threads."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._open:
                self._open[name] = self._opened(name)
            return self._open[name]

    def _opened(self, name: str) -> int:
        """Raises SourceChangedError if the file is not as long as when its header was read."""
        path, header = self._folder.root / name, self._folder.headers[name]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(fd).st_size != header.data_start + header.data_bytes:
            os.close(fd)
            raise SourceChangedError(
                "The file changed since its header was read",
                file=path,
                hint="Is something still writing to it? Run the same command again.",
            )
        return fd

    def forget(self, name: str) -> None:
        with self._lock:
            if (fd := self._open.pop(name, None)) is not None:
                os.close(fd)

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


__all__ = ["INDEX", "Checkpoint", "Extent", "Located", "inspect_folder", "summary"]
