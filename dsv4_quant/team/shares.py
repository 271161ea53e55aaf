"""Who does what: a pure function of the sizes, so that every process finds the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heapreplace
from typing import TypeVar

Key = TypeVar("Key")


def shares(sizes: Mapping[Key, int], count: int) -> list[list[Key]]:
    """The keys in so many lists of about equal size: the largest first, each to the emptiest list.

    Every list has its keys in the mapping's order. For few and large things, such as files.
    """
    loads = [(0, number) for number in range(count)]
    heapify(loads)
    owner = {}
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        load, number = loads[0]
        owner[key] = number
        heapreplace(loads, (load + sizes[key], number))
    found: list[list[Key]] = [[] for _ in range(count)]
    for key in sizes:
        found[owner[key]].append(key)
    return found


def runs(sizes: Mapping[Key, int], count: int) -> list[list[Key]]:
    """The keys in so many lists, each a run of the mapping's order: for many and small things.

    Weights stand in files in about that order, so every process reads files from front to back.
    """
    total, before = max(sum(sizes.values()), 1), 0
    found: list[list[Key]] = [[] for _ in range(count)]
    for key, size in sizes.items():
        middle = before + size // 2
        found[min(middle * count // total, count - 1)].append(key)
        before += size
    return found
