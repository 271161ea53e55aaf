"""What a checkpoint folder holds, found out from names, index and headers alone.

``survey`` never raises for what it finds: every problem becomes an error object in a list, so that
a judge can report all of them, and a reader can refuse because of the first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_quant import strict_json
from dsv4_quant.catalogue import Layout
from dsv4_quant.checkpoint.header import MAX_HEADER_BYTES, Header, read_header
from dsv4_quant.errors import (
    CatalogueError,
    Dsv4Error,
    IndexFileError,
    UnreadableError,
    some,
)
from dsv4_quant.strict_json import clip, shown

INDEX = "model.safetensors.index.json"
PARTIAL = ".dsv4-partial"
"""Where a conversion works until it is complete."""
MAX_INDEX_BYTES = 32 << 20
MAX_INDEX_VALUES = 500_000
"""V4-Pro's index has 149,782 values in 12 MB."""

MAX_FILES = 8192
MAX_PROBLEMS = 200_000
"""More than any released checkpoint has tensors."""

_HF = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors|model\.safetensors")
_MP = re.compile(r"model(0|[1-9][0-9]{0,4})-mp([1-9][0-9]{0,4})\.safetensors")


@dataclass(slots=True)
class Folder:
    """The files of one checkpoint and what is wrong with them."""

    root: Path
    layout: Layout
    gpus: int
    freed: Path | None = None
    """Where the headers of shards lie that a ``convert --move`` has freed already."""
    headers: dict[str, Header] = field(default_factory=dict)
    """By file name; in an mp checkpoint in the order of the ranks."""
    index: dict[str, str] = field(default_factory=dict)
    total_size: int | None = None
    problems: list[Dsv4Error] = field(default_factory=list)
    header_bytes: int = 0

    def report(self, problems: Iterable[Dsv4Error]) -> None:
        """Adds problems, as many as the memory for them is worth."""
        for problem in problems:
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)
                continue
            if len(self.problems) == MAX_PROBLEMS:
                self.problems.append(
                    UnreadableError("More problems than are worth listing", file=self.root)
                )
            return

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(header.data_bytes for header in self.headers.values())


def is_weight_file(name: str) -> bool:
    """Whether a file bears the name of a shard or of a rank's file."""
    return bool(_HF.fullmatch(name) or _MP.fullmatch(name))


def survey(root: Path, freed: Path | None = None) -> Folder:
    """Looks at a folder. Raises UnreadableError only when it is no checkpoint at all.

    ``freed``: a folder of headers that stand for files which are not there any more.
    """
    names = _safetensors_names(root)
    if freed is not None:
        names = sorted({*names, *_safetensors_names(freed)})
    mp = [name for name in names if _MP.fullmatch(name)]
    hf = [name for name in names if _HF.fullmatch(name)]
    if mp and hf:
        raise UnreadableError(
            f"The folder holds two checkpoints, {hf[0]} ... and {mp[0]} ...",
            file=root,
            hint="Keep each checkpoint in a folder of its own.",
        )
    if not mp and not hf and (root / PARTIAL).is_dir():
        raise UnreadableError(
            "The folder holds an unfinished conversion",
            file=root,
            hint="Run the command that began it again: it continues.",
        )
    if not mp and not hf and not (root / INDEX).is_file():
        raise UnreadableError(
            "The folder holds no model-*-of-*.safetensors and no model*-mp*.safetensors", file=root
        )
    folder = Folder(root, "mp" if mp else "hf", 1, freed)
    stray = set(names) - set(mp) - set(hf)
    folder.report(
        UnreadableError(
            "A safetensors file that is no part of the checkpoint's layout",
            file=root / clip(name, 255),
            hint="Move it elsewhere.",
        )
        for name in sorted(stray)
    )
    if mp:
        _survey_ranks(folder, mp)
    else:
        _survey_shards(folder, hf)
    return folder


def _safetensors_names(root: Path) -> list[str]:
    try:
        if not root.is_dir():
            raise UnreadableError("No such folder", file=root, hint="Give a checkpoint's folder.")
        with os.scandir(root) as entries:
            found = sorted(entry.name for entry in entries if entry.name.endswith(".safetensors"))
    except OSError as error:
        raise UnreadableError(
            f"The folder cannot be read: {error.strerror}", file=clip(str(root), 255)
        ) from None
    if len(found) > MAX_FILES:
        raise UnreadableError(f"The folder holds {len(found)} safetensors files", file=root)
    return found


def _read(folder: Folder, name: str) -> None:
    path, home = folder.root / name, folder.root
    if folder.freed is not None and not path.exists():
        path, home = folder.freed / name, folder.freed
    try:
        check_inside(home, path)
        header = read_header(path)
    except Dsv4Error as error:
        folder.report([error])
        return
    folder.headers[name] = header
    folder.header_bytes += header.data_start
    if folder.header_bytes > MAX_HEADER_BYTES:
        raise UnreadableError(
            f"The headers of the folder's files are together larger than {MAX_HEADER_BYTES:,}"
            " bytes, no model's are",
            file=folder.root,
        )


def check_inside(root: Path, path: Path) -> None:
    """A regular file in the folder, or a link that stays in it or in the hub's own cache."""
    try:
        target, home = path.resolve(strict=True), root.resolve(strict=True)
        is_file = target.is_file()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, in Python 3.11 and 3.12
        is_file = False
    if not is_file:
        raise UnreadableError("Not a regular file, or it is missing", file=path)
    blobs = home.parent.parent / "blobs"  # models--x--y/{blobs,snapshots/REVISION}
    in_cache = home.parent.name == "snapshots" and target.parent == blobs
    if not in_cache and not target.is_relative_to(home):
        raise UnreadableError(
            f"A symbolic link that leaves the folder, to {clip(str(target), 255)}",
            file=path,
            hint="Replace it by the file that you mean.",
        )


def _survey_ranks(folder: Folder, names: list[str]) -> None:
    counts = {int(match[2]) for name in names if (match := _MP.fullmatch(name))}
    if len(counts) > 1:
        raise UnreadableError(
            f"The folder mixes checkpoints for {some(map(str, counts))} GPUs",
            file=folder.root,
            hint="Keep each in a folder of its own.",
        )
    folder.gpus = counts.pop()
    held = {rank for name in names if (rank := _rank(name)) < folder.gpus}
    for rank in sorted(held):
        _read(folder, f"model{rank}-mp{folder.gpus}.safetensors")
    missing = [rank for rank in range(folder.gpus) if rank not in held]
    folder.report(
        UnreadableError(
            f"Rank {rank} of {folder.gpus} is missing",
            file=folder.root / f"model{rank}-mp{folder.gpus}.safetensors",
        )
        for rank in missing[:MAX_FILES]
    )
    too_many = [name for name in names if _rank(name) >= folder.gpus]
    folder.report(UnreadableError("A rank too many", file=folder.root / n) for n in too_many)


def _rank(name: str) -> int:
    match = _MP.fullmatch(name)
    assert match is not None
    return int(match[1])


def _survey_shards(folder: Folder, names: list[str]) -> None:
    path = folder.root / INDEX
    if path.exists() or path.is_symlink() or len(names) != 1:
        try:
            _read_index(folder, path)
        except Dsv4Error as error:
            folder.report([error])
    indexed = set(folder.index.values())
    folder.report(
        IndexFileError(
            "The index names a shard that is not there",
            file=folder.root / name,
            hint="The download is not complete; run it again.",
        )
        for name in sorted(indexed - set(names))
    )
    for name in names:
        _read(folder, name)
        if folder.index and name in folder.headers and name not in indexed:
            folder.report(
                [
                    IndexFileError(
                        "A shard that the index does not name",
                        file=folder.root / name,
                        hint="A leftover of another revision? Remove it, or fetch the right index.",
                    )
                ]
            )
    held = {tensor: name for name, header in folder.headers.items() for tensor in header.entries}
    entries = sum(len(header.entries) for header in folder.headers.values())
    if held == folder.index and len(held) == entries:
        folder.index = held  # what is equal is kept once: 25 MB for V4-Pro
        return
    if folder.index:
        folder.report(_index_differences(folder, indexed))
    folder.report(_doubles(folder))


def _read_index(folder: Folder, path: Path) -> None:
    check_inside(folder.root, path)
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise IndexFileError("The index is larger than 32 MiB, no model's is", file=path)
        raw = strict_json.parse(path.read_bytes(), max_values=MAX_INDEX_VALUES)
    except OSError as error:
        raise IndexFileError(f"The index cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise IndexFileError(f"The index is not valid JSON: {error}", file=path) from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError("The index has no weight_map", file=path)
    shards: set[str] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not (name in shards or _HF.fullmatch(name)):
            raise IndexFileError(
                f"The index sends a tensor to {shown(name)}, not to a shard's name",
                file=path,
                tensor=clip(tensor),
            )
        shards.add(name)
    folder.index = weight_map
    metadata = raw.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    folder.total_size = total if type(total) is int else None


def _index_differences(folder: Folder, indexed: set[str]) -> Iterator[Dsv4Error]:
    """Index and headers must say the same, tensor by tensor."""
    path = folder.root / INDEX
    for tensor, name in folder.index.items():
        header = folder.headers.get(name)
        if header is not None and tensor not in header.entries:
            yield IndexFileError(
                f"The index says {name} holds it; it does not", file=path, tensor=clip(tensor, 512)
            )
    for name in indexed & folder.headers.keys():
        for tensor in folder.headers[name].entries:
            said = folder.index.get(tensor, "nothing")
            if said != name:
                yield IndexFileError(
                    f"{name} holds it; the index says {said}", file=path, tensor=tensor
                )


def _doubles(folder: Folder) -> Iterator[Dsv4Error]:
    """A tensor in two shards has two values."""
    seen: dict[str, str] = {}
    for name, header in folder.headers.items():
        for tensor in header.entries:
            if tensor in seen:
                yield CatalogueError(
                    f"Held by two shards, {seen[tensor]} and {name}",
                    file=folder.root / name,
                    tensor=tensor,
                )
            seen[tensor] = name
