"""A file that appears whole, under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from dsv4_quant.errors import DiskSpaceError, WriteError


def target(value: Path) -> Path:
    """The callback of an option that names an output file: there must be a folder for it."""
    if value.is_dir() or not value.parent.is_dir():
        raise typer.BadParameter(f"{value} cannot be written: no such folder, or it is one.")
    return value


def check_room(path: Path, size: int) -> None:
    """Raises DiskSpaceError if so many bytes do not fit where a file is to be."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DiskSpaceError(
            f"The output needs {size:,} bytes, the disk has {free:,} left",
            file=path,
            hint="Make room, or name another place.",
        )


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write the file; it gets its name at the end of the block. Raises WriteError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise WriteError(f"The system refused to write: {error.strerror}", file=path) from None
    finally:
        partial.unlink(missing_ok=True)
