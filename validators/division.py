"""Which process looks at what, when several share a judgement.

A file goes to one process with the weights that begin in it: what is read for its hash comes from
the page cache for its values. A file that is more than a process's fair share is taken apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsv4_quant.team.shares import shares

Item = tuple[Literal["file", "weight"], str]


@dataclass(frozen=True, slots=True)
class Part:
    """What one process does."""

    files: set[str] = field(default_factory=set)
    """To be hashed."""
    weights: set[str] = field(default_factory=set)


def divided(
    files: Mapping[str, int], weights: Mapping[str, tuple[str, int]], count: int
) -> list[Part]:
    """One part for each of so many processes, about equal in bytes.

    Args:
        files: those to be hashed, and their sizes.
        weights: by name, the file in which it begins and the bytes to be read.
    """
    groups: dict[str, dict[Item, int]] = defaultdict(dict)
    for file, size in files.items():
        groups[file]["file", file] = size
    for name, (file, size) in weights.items():
        groups[file]["weight", name] = size
    fair = sum(sum(items.values()) for items in groups.values()) / count
    units: dict[tuple[Item, ...], int] = {}
    for items in groups.values():
        whole = sum(items.values())
        units |= {tuple(items): whole} if whole <= fair else {(i,): n for i, n in items.items()}
    parts = []
    for chosen in shares(units, count):
        held = [item for unit in chosen for item in unit]
        parts.append(
            Part({n for kind, n in held if kind == "file"}, {n for k, n in held if k == "weight"})
        )
    return parts
