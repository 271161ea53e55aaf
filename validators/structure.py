"""The first level: headers, index and configs against the catalogue. No tensor data is read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dsv4_quant.errors import (
    CatalogueError,
    ConfigError,
    Dsv4Error,
    HeaderError,
    IndexFileError,
)
from dsv4_quant.validators.present import judge_presence
from dsv4_quant.validators.quantisation import judge_inference_config, judge_quantisation
from dsv4_quant.validators.report import Finding, error
from dsv4_quant.validators.subject import Subject
from dsv4_quant.validators.tensors import judge_index, judge_tensors, unreadable
from dsv4_quant.validators.told import judge_told

_CHECK_OF: dict[type[Dsv4Error], str] = {
    HeaderError: "headers",
    IndexFileError: "index",
    ConfigError: "config",
    CatalogueError: "tensors",
}
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")


def judge_structure(subject: Subject, sizes: dict[str, int]) -> list[Finding]:
    """Every finding of this level. ``sizes``: the files that the folder holds."""
    told = [] if is_incomplete(subject) else list(judge_told(subject))
    found = [
        *told,
        *judge_quantisation(subject),
        *judge_inference_config(subject),
        *judge_index(subject),
        *judge_tensors(subject),
        *_judge_shard_names(subject),
        *judge_presence(subject.root, sizes),
    ]
    return found + list(_remaining(subject, found))


def is_incomplete(subject: Subject) -> bool:
    """Whether some weight file is missing or has no sound header."""
    folder = subject.folder
    if folder.layout == "mp":
        return len(folder.headers) < folder.gpus
    return not folder.headers or bool(set(folder.index.values()) - folder.headers.keys())


def _remaining(subject: Subject, found: list[Finding]) -> Iterator[Finding]:
    """The reader's own problems, where no finding tells them with more detail.

    Nothing that keeps a reader from opening the folder may go without a finding.
    """
    told = {(one.check, one.tensor) for one in found if one.tensor is not None}
    has_config = any(one.check == "config" and one.severity == "error" for one in found)
    lost = unreadable(subject)
    for problem in subject.folder.problems:
        check = _CHECK_OF.get(type(problem), "files")
        file = _inside(subject.root, problem)
        if problem.tensor is not None and (check, problem.tensor) in told:
            continue
        if check == "config" and has_config and subject.config is not None:
            continue
        if check == "tensors" and problem.tensor is not None and _is_lost(subject, problem.tensor):
            continue
        meaning = problem.hint or "A reader refuses the folder because of it."
        if file is not None and file in lost:
            meaning += f" {lost[file]:,} of its tensors cannot be judged."
        yield error(check, problem.what.rstrip("."), meaning, file=file, tensor=problem.tensor)


def _is_lost(subject: Subject, tensor: str) -> bool:
    """Whether a tensor is missing only because its file is: that file's finding says so."""
    return tensor not in subject.where and subject.folder.index.get(tensor) in unreadable(subject)


def _inside(root: Path, problem: Dsv4Error) -> str | None:
    """The file's name in the folder; None for the folder itself."""
    if problem.file is None:
        return None
    name = os.path.relpath(problem.file, root)
    return None if name == "." else name


def _judge_shard_names(subject: Subject) -> Iterator[Finding]:
    """``model-i-of-n``: one n, and every i from 1 to n."""
    names = set(subject.folder.headers) | set(subject.folder.index.values())
    shards = [match for name in sorted(names) if (match := _SHARD.fullmatch(name))]
    if not shards:
        return
    count = Counter(int(shard[2]) for shard in shards).most_common(1)[0][0]
    held = {int(shard[1]) for shard in shards if int(shard[2]) == count}
    for shard in shards:
        number, of = int(shard[1]), int(shard[2])
        if of != count or not 1 <= number <= of:
            yield error("files", f"shard {number} of {of}",
                        "Two revisions or two conversions lie in one folder.",
                        file=shard[0], expected=f"a shard of {count}")  # fmt: skip
    lacking = [number for number in range(1, min(count, 10_000) + 1) if number not in held]
    if lacking:
        some = ", ".join(map(str, lacking[:5])) + (" ..." if len(lacking) > 5 else "")
        yield error("files", f"{len(held)} shards, without number {some}",
                    "The download or copy is not complete.",
                    expected=f"shards 1 to {count}")  # fmt: skip
