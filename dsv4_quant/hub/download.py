"""From an id to a local folder that holds all of a checkpoint: huggingface-hub's own download.

It downloads, resumes and caches; ``opened`` does the same without needing the disk for all of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsv4_quant.hub.ids import UNWANTED, WANTED, explain, parse_id
from dsv4_quant.progress import NoProgress, Progress


def resolve(
    src: str | Path, *, progress: Progress | None = None, cache: Path | None = None
) -> Path:
    """The local folder of a checkpoint: ``src`` if it is a path, else a download of the id.

    ``owner/name`` or ``owner/name@revision`` is an id, unless there is a file or folder of that
    name. A connection that is cut is resumed in the middle of the file; files that the cache
    (huggingface-hub's own, or ``cache``) holds from an earlier run are not fetched again. Raises
    UsageError for what cannot be had, UnreadableError when the hub cannot be reached, and
    DiskSpaceError.
    """
    if os.path.lexists(src):
        return Path(src)
    return _download(*parse_id(src), progress or NoProgress(), cache)


def _download(repo: str, revision: str | None, progress: Progress, cache: Path | None) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's own

    xet_error = getattr(errors, "XetDownloadError", OSError)  # not in huggingface-hub 1.0
    progress.stage(f"downloading {repo}")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                tqdm_class=_bar_for(progress),
            )
        )
    except (HTTPError, OSError, ValueError, RuntimeError, xet_error) as error:
        explain(repo, revision, error)


def _bar_for(progress: Progress) -> type[Any]:
    """A class for huggingface-hub's progress bars that shows nothing and tells ``progress``.

    It makes bars for files, for bytes received and for bytes in place. The last are told of: also
    those that an earlier run fetched.
    """
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            desc = str(kwargs.get("desc") or "")
            self._is_told = kwargs.get("unit") == "B" and desc != "Downloading bytes"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        @property
        def total(self) -> int | None:
            return self._total

        @total.setter
        def total(self, count: int | None) -> None:
            self._total = count
            if self._is_told and count:
                progress.total(int(count))

        def update(self, n: float | None = 1) -> None:
            if self._is_told and n:
                progress.advance(int(n))

    return Told
