"""What can be compared with another checkpoint without its data: config, names, small files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.sidecars import carried_files
from dsv4_quant.errors import Dsv4Error
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.quantisation import config_differences
from dsv4_quant.validators.report import Finding, error, warning
from dsv4_quant.validators.subject import Subject

MINOR = (".md", ".txt", ".pdf", ".png", ".jpg", ".svg")
"""Files that no program reads."""


def judge_against(subject: Subject, other: Checkpoint) -> Iterator[Finding]:
    """Differences in config, weights' names and shapes, and the files beside the weights."""
    if subject.config is not None:
        for key, mine, theirs in config_differences(subject.config, other.config):
            yield error("against", f"{key} {mine}",
                        "The other checkpoint's config says otherwise: the model would compute"
                        " something else.",
                        file=subject.config_file, expected=f"{key} {theirs}")  # fmt: skip
    if subject.catalogue is not None:
        yield from _judge_names(subject, other)
    yield from _judge_small_files(subject.root, other.root)


def _judge_names(subject: Subject, other: Checkpoint) -> Iterator[Finding]:
    assert subject.catalogue is not None
    mine, theirs = subject.catalogue.specs, other.specs
    for name in theirs.keys() - mine.keys():
        yield error("against", "no such weight", "The other checkpoint has it.", tensor=name,
                    expected=str(list(theirs[name].shape)))  # fmt: skip
    for name in mine.keys() - theirs.keys():
        yield error("against", str(list(mine[name].shape)), "The other checkpoint has no such one.",
                    tensor=name, expected="no such weight")  # fmt: skip
    for name in mine.keys() & theirs.keys():
        if mine[name].shape != theirs[name].shape:
            yield error("against", f"shape {list(mine[name].shape)}",
                        "The other checkpoint's weight has another shape.",
                        tensor=name, expected=f"shape {list(theirs[name].shape)}")  # fmt: skip


def _judge_small_files(mine: Path, theirs: Path) -> Iterator[Finding]:
    """Tokenizer and the like must be the same; what only people read may differ."""
    for name, path in carried_files(theirs):
        if name.endswith(MINOR) or "." not in name.rsplit("/", 1)[-1]:
            continue
        own, shown = mine / name, clip(name, 255)
        if not own.is_file():
            yield warning("against", "missing", "The other checkpoint has it.", file=shown,
                          expected="a file")  # fmt: skip
        elif not _are_equal(own, path):
            yield error("against", "another content", "The other checkpoint's file is different.",
                        file=shown, expected="the same bytes")  # fmt: skip


def _are_equal(one: Path, other: Path) -> bool:
    try:
        if one.stat().st_size != other.stat().st_size:
            return False
        with one.open("rb") as left, other.open("rb") as right:
            while chunk := left.read(1 << 20):
                if chunk != right.read(len(chunk)):
                    return False
    except (Dsv4Error, OSError):
        return False
    return True
