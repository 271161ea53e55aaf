"""The hashes that the hub published for the files of a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_METADATA = Path(".cache/huggingface/download")


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
