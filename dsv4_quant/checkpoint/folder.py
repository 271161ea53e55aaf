"""What a checkpoint folder holds, found out from names, index and headers alone.

``survey`` never raises for what it finds: every problem becomes an error object in a list, so that
a judge can report all of them, and a reader can refuse because of the first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant.catalogue import Layout
from dsv4_quant.checkpoint.header import Header, read_header
from dsv4_quant.errors import (
    CatalogueError,
    Dsv4Error,
    IndexFileError,
    UnreadableError,
    some,
)

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_FILES = 8192

_HF = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors|model\.safetensors")
_MP = re.compile(r"model(0|[1-9]\d{0,4})-mp([1-9]\d{0,4})\.safetensors")


@dataclass(slots=True)
class Folder:
    """The files of one checkpoint and what is wrong with them."""

    root: Path
    layout: Layout
    gpus: int
    headers: dict[str, Header] = field(default_factory=dict)
    """By file name; in an mp checkpoint in the order of the ranks."""
    index: dict[str, str] = field(default_factory=dict)
    total_size: int | None = None
    problems: list[Dsv4Error] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(header.data_bytes for header in self.headers.values())


def survey(root: Path) -> Folder:
    """Looks at a folder. Raises UnreadableError only when it is no checkpoint at all."""
    if not root.is_dir():
        raise UnreadableError(
            "No such folder", file=root, hint="Give a checkpoint's folder or a Hugging Face id."
        )
    names = sorted(_safetensors_names(root))
    mp = [name for name in names if _MP.fullmatch(name)]
    hf = [name for name in names if _HF.fullmatch(name)]
    if mp and hf:
        raise UnreadableError(
            f"The folder holds two checkpoints, {hf[0]} ... and {mp[0]} ...",
            file=root,
            hint="Keep each checkpoint in a folder of its own.",
        )
    if not mp and not hf and not (root / INDEX).is_file():
        raise UnreadableError(
            "The folder holds no model-*-of-*.safetensors and no model*-mp*.safetensors", file=root
        )
    folder = Folder(root, "mp" if mp else "hf", 1)
    stray = set(names) - set(mp) - set(hf)
    for name in sorted(stray):
        folder.problems.append(
            UnreadableError(
                "A safetensors file that is no part of the checkpoint's layout",
                file=root / name,
                hint="Move it elsewhere.",
            )
        )
    if mp:
        _survey_ranks(folder, mp)
    else:
        _survey_shards(folder, hf)
    return folder


def _safetensors_names(root: Path) -> Iterator[str]:
    with os.scandir(root) as entries:
        found = [entry.name for entry in entries if entry.name.endswith(".safetensors")]
    if len(found) > MAX_FILES:
        raise UnreadableError(f"The folder holds {len(found)} safetensors files", file=root)
    yield from found


def _read(folder: Folder, name: str) -> None:
    path = folder.root / name
    try:
        check_inside(folder.root, path)
        folder.headers[name] = read_header(path)
    except Dsv4Error as error:
        folder.problems.append(error)


def check_inside(root: Path, path: Path) -> None:
    """A regular file in the folder, or a link that stays in it or in the hub's own cache."""
    if path.is_symlink():
        target, home = path.resolve(), root.resolve()
        blobs = home.parent.parent / "blobs"  # models--x--y/{blobs,snapshots/REVISION}
        in_cache = home.parent.name == "snapshots" and target.parent == blobs
        if not in_cache and not target.is_relative_to(home):
            raise UnreadableError(
                f"A symbolic link that leaves the folder, to {target}",
                file=path,
                hint="Replace it by the file that you mean.",
            )
    if not path.is_file():
        raise UnreadableError("Not a regular file, or it is missing", file=path)


def _survey_ranks(folder: Folder, names: list[str]) -> None:
    counts = {int(match[2]) for name in names if (match := _MP.fullmatch(name))}
    if len(counts) > 1:
        raise UnreadableError(
            f"The folder mixes checkpoints for {some(map(str, counts))} GPUs",
            file=folder.root,
            hint="Keep each in a folder of its own.",
        )
    folder.gpus = counts.pop()
    for rank in range(folder.gpus):
        name = f"model{rank}-mp{folder.gpus}.safetensors"
        if name in names:
            _read(folder, name)
        elif rank < MAX_FILES:
            folder.problems.append(
                UnreadableError(f"Rank {rank} of {folder.gpus} is missing", file=folder.root / name)
            )
    too_many = [n for n in names if int(n[5 : n.index("-")]) >= folder.gpus]
    folder.problems += [UnreadableError("A rank too many", file=folder.root / n) for n in too_many]


def _survey_shards(folder: Folder, names: list[str]) -> None:
    path = folder.root / INDEX
    if path.exists() or path.is_symlink() or len(names) != 1:
        try:
            _read_index(folder, path)
        except Dsv4Error as error:
            folder.problems.append(error)
    for name in sorted(set(folder.index.values()) - set(names)):
        folder.problems.append(
            IndexFileError(
                "The index names a shard that is not there",
                file=folder.root / name,
                hint="The download is not complete; run it again.",
            )
        )
    for name in names:
        _read(folder, name)
        if folder.index and name in folder.headers and name not in folder.index.values():
            folder.problems.append(
                IndexFileError(
                    "A shard that the index does not name",
                    file=folder.root / name,
                    hint="A leftover of another revision? Remove it, or fetch the right index.",
                )
            )
    if folder.index:
        _compare_index(folder)
    _check_unique(folder)


def _read_index(folder: Folder, path: Path) -> None:
    check_inside(folder.root, path)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise IndexFileError("The index is larger than 64 MiB", file=path)
    try:
        raw = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise IndexFileError(f"The index cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError) as error:
        raise IndexFileError(f"The index is not valid JSON: {error}", file=path) from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError("The index has no weight_map", file=path)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _HF.fullmatch(name):
            raise IndexFileError(
                f"The index sends a tensor to {str(name)[:100]!r}, not to a shard's name",
                file=path,
                tensor=tensor[:200],
            )
    folder.index = weight_map
    metadata = raw.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    folder.total_size = total if type(total) is int else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _compare_index(folder: Folder) -> None:
    """Index and headers must say the same, tensor by tensor."""
    path = folder.root / INDEX
    for tensor, name in folder.index.items():
        header = folder.headers.get(name)
        if header is not None and tensor not in header.entries:
            folder.problems.append(
                IndexFileError(f"The index says {name} holds it; it does not", file=path,
                               tensor=tensor)
            )  # fmt: skip
    for name, header in folder.headers.items():
        for tensor in header.entries:
            if folder.index.get(tensor) != name and name in folder.index.values():
                said = folder.index.get(tensor, "nothing")
                folder.problems.append(
                    IndexFileError(f"{name} holds it; the index says {said}", file=path,
                                   tensor=tensor)
                )  # fmt: skip


def _check_unique(folder: Folder) -> None:
    """A tensor in two shards has two values."""
    seen: dict[str, str] = {}
    for name, header in folder.headers.items():
        for tensor in header.entries:
            if tensor in seen:
                folder.problems.append(
                    CatalogueError(
                        f"Held by two shards, {seen[tensor]} and {name}",
                        file=folder.root / name,
                        tensor=tensor,
                    )
                )
            seen[tensor] = name
