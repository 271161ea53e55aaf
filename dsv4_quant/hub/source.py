"""``opened``: a checkpoint's folder, or what stands for the folder of a checkpoint on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_quant.progress import NoProgress, Progress

if TYPE_CHECKING:
    from dsv4_quant.hub.arrivals import Arrivals


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint: its folder, and what brings its data where the folder holds only headers."""

    folder: Path
    arrivals: Arrivals | None = None


@contextmanager
def opened(
    src: str | Path,
    *,
    progress: Progress | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
    pause: float = 1.0,
) -> Iterator[Source]:
    """A checkpoint's folder or id, without downloading its weights.

    A folder is taken as it is, and so is what huggingface-hub's cache (or ``cache``) holds complete
    of this commit. For everything else a temporary folder of headers exists until the block ends.
    Where the hub cannot be reached the cache must do, as in ``resolve``. ``pause`` is the first
    wait, in seconds, after a failure. Raises what ``resolve`` raises, and SourceDamagedError at
    bytes that do not have the hash that the hub published.
    """
    if os.path.lexists(src):
        yield Source(Path(src))
        return
    from dsv4_quant.hub.headers import fetched  # most commands get a folder: 30 ms for nothing

    with fetched(src, progress or NoProgress(), cache, endpoint, pause) as source:
        yield source
