"""Where a command's checkpoint comes from, for one process or for several that share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4_quant.cli.together import here
from dsv4_quant.hub import Source, opened, resolve
from dsv4_quant.progress import Progress


@contextmanager
def source(path: str, progress: Progress) -> Iterator[Source]:
    """``hub.opened``; several processes need a folder that stays."""
    if here().size > 1:
        yield Source(found(path, progress))
        return
    with opened(path, progress=progress) as one:
        yield one


def found(path: str, progress: Progress) -> Path:
    """The folder of a path or id; the first process downloads what another will find."""
    folder = Path(here().lead(lambda: str(resolve(path, progress=progress))))
    return folder if here().is_first else resolve(path, progress=progress)
