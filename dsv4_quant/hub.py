"""Checkpoints on the Hugging Face hub: from an id to a local folder, and the hashes it publishes.

huggingface-hub downloads, resumes and caches. This module decides what is an id, which files a
checkpoint needs, and what to tell the user when it does not work. It is imported only where an id
is met: huggingface-hub takes a second to load.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dsv4_quant.errors import DiskSpaceError, Dsv4Error, UnreadableError, UsageError
from dsv4_quant.progress import NoProgress, Progress
from dsv4_quant.strict_json import clip

WANTED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "*.txt", "*.md", "LICENSE*",
)  # fmt: skip
"""Weights, configs, tokenizer, the published code and texts; pickles are never fetched."""

UNWANTED = ("*/*.safetensors", "*.bin", "*.pt", "*.pth", ".*")
"""Weights in subfolders are another checkpoint's."""

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.][\w./-]*))?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_METADATA = Path(".cache/huggingface/download")


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
    match = _ID.fullmatch(str(src))
    if match is None:
        raise UnreadableError(
            f"There is no folder {str(src)!r}, and it is no Hugging Face id",
            hint="An id looks like deepseek-ai/DeepSeek-V4-Flash, or with @revision at its end.",
        )
    return _download(match[1], match[2], progress or NoProgress(), cache)


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
        _explain(repo, revision, error)


def _explain(repo: str, revision: str | None, error: Exception) -> NoReturn:
    """Raises what huggingface-hub's error means for a user of this tool."""
    from huggingface_hub import errors

    found: Dsv4Error
    cause = clip(" ".join(str(error.__cause__ or error).split()), 300) or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        found = UsageError(
            f"{repo} is gated: its owner lets only known users download it",
            hint="Accept its terms on the hub's site, then log in with `hf auth login`.",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = UsageError(
            f"The hub has no {repo} that you may see, and there is no folder of that name",
            hint="Check the spelling; for a private one log in with `hf auth login`.",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        found = UsageError(
            f"{repo} has no revision {revision!r}", hint="Give a branch, a tag or a commit."
        )
    elif isinstance(error, errors.LocalEntryNotFoundError):
        found = UnreadableError(
            f"The hub cannot be reached, and the cache does not hold all of {repo}"
            f"{f' at {revision!r}' if revision else ''}: {cause}",
            hint="Is the network up, or HF_HUB_OFFLINE set? A folder of files works as well.",
        )
    elif isinstance(error, errors.HFValidationError):
        found = UsageError(f"{repo!r} is not an id that the hub can have")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        found = DiskSpaceError(
            f"The disk is full before {repo} is complete",
            hint="Make room, or set HF_HOME to a folder on a larger disk; what is here is kept.",
        )
    else:
        found = UnreadableError(
            f"The download of {repo} failed: {cause}",
            hint="Run the same command again: files that are complete are kept.",
        )
    raise found from None


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


def published_sha256(root: Path) -> dict[str, str]:
    """SHA-256 by file name, as the hub published them, of a folder that came from it.

    Only of files that the hub keeps outside git, as all weights are. In huggingface-hub's cache a
    file is a link to a blob that is named by its hash; in a folder downloaded with ``local_dir``
    a note beside the files holds it. Empty where the folder did not come from the hub.
    """
    return dict(sorted([*_noted(root), *_linked(root)]))


def _linked(root: Path) -> Iterator[tuple[str, str]]:
    home = root.resolve()
    if home.parent.name != "snapshots":
        return
    blobs = home.parent.parent / "blobs"
    for folder, _, files in os.walk(home):
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                continue
            target = Path(os.path.normpath(path.parent / path.readlink()))
            if target.parent == blobs and _SHA256.fullmatch(target.name):
                yield path.relative_to(home).as_posix(), target.name


def _noted(root: Path) -> Iterator[tuple[str, str]]:
    """Notes hold three lines: the commit, the hash (of git, or SHA-256), the time."""
    notes = root / _METADATA
    for folder, _, files in os.walk(notes):
        for file in files:
            name = Path(folder, file).relative_to(notes).as_posix().removesuffix(".metadata")
            if not file.endswith(".metadata") or not (root / name).is_file():
                continue
            with Path(folder, file).open("rb") as note:
                lines = note.read(1024).decode("ascii", "replace").splitlines()
            if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
                yield name, lines[1]
