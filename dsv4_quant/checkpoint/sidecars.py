"""What lies beside the weights: the files that come along, and who a checkpoint is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from blake3 import blake3

from dsv4_quant.checkpoint.folder import INDEX, Folder, check_inside
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.sums import LISTS
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UnreadableError
from dsv4_quant.strict_json import clip

MADE_ANEW = frozenset((INDEX, MANIFEST, *LISTS.values(), "config.json", "inference/config.json"))
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
UNSEEN = (".DS_Store", ".gitignore")
MAX_CARRIED_BYTES = 1 << 30


def carried_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(name with /, path) of every other file of a checkpoint, sorted: tokenizer, README, code.

    Left out: weights in any form (also pickles), hidden folders (.git, .cache), and what every
    output makes anew.
    Raises UnreadableError at a link that leaves the folder or leads to a folder, at a name that
    SHA256SUMS cannot hold, or at more than 1 GiB in all.
    """
    total = 0
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise UnreadableError(
                    "A symbolic link to a folder",
                    file=Path(folder) / clip(name, 255),
                    hint="Replace it by the folder that you mean, or remove it.",
                )
        for file in sorted(files):
            path = Path(folder) / file
            name = path.relative_to(root).as_posix()
            weights = file.endswith((".safetensors", *PICKLES))
            if file in UNSEEN or weights or name in MADE_ANEW:
                continue
            if not name.isprintable() or "\\" in name:
                raise UnreadableError(
                    "A file's name that cannot be written into a list",
                    file=clip(str(path), 255),
                    hint="Rename the file, or move it elsewhere.",
                )
            check_inside(root, path)
            total += path.stat().st_size
            if total > MAX_CARRIED_BYTES:
                raise UnreadableError(
                    "The files beside the weights are larger than 1 GiB",
                    file=path,
                    hint="Move what is no part of the checkpoint elsewhere.",
                )
            yield name, path


def _unreadable(error: OSError) -> NoReturn:
    raise UnreadableError(f"A folder cannot be read: {error.strerror}", file=error.filename)


def identity(folder: Folder, config: ModelConfig) -> str:
    """A hash of everything that config and headers say: the same for two copies of a checkpoint."""
    hasher = blake3(json.dumps(dict(config.raw), sort_keys=True).encode())
    for name, header in sorted(folder.headers.items()):
        hasher.update(f"\n{name} {header.data_start}".encode())
        for tensor, entry in header.entries.items():
            hasher.update(f"\n{tensor} {entry.dtype} {entry.shape} {entry.start}".encode())
    return str(hasher.hexdigest())
