"""Checked access to JSON that a stranger wrote; every fault is a ValueError that says where."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from dsv4_quant.strict_json import clip, shown


@dataclass(frozen=True, slots=True)
class Node:
    """A value, and where it stands in its document."""

    value: Any
    where: str = "the document"

    def fail(self, what: str) -> NoReturn:
        """Raises ValueError: this value is not what it must be."""
        raise ValueError(f"{self.where} {what}")

    def object(self, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        """It must be an object with these keys and no others."""
        if not isinstance(self.value, dict):
            self.fail(f"is {shown(self.value)}, not an object")
        if missing := [key for key in required if key not in self.value]:
            self.fail(f"has no {missing[0]!r}")
        if unknown := sorted(self.value.keys() - {*required, *optional}):
            self.fail(f"has an unknown key {clip(unknown[0])!r}")

    def __getitem__(self, key: str) -> Node:
        return Node(self.value[key], key if self.where == "the document" else f"{self.where}.{key}")

    def has(self, key: str) -> bool:
        """Whether an object has a key, and something else than null under it."""
        return self.value.get(key) is not None

    def items(self, least: int, most: int) -> Iterator[Node]:
        """The entries of a list of bounded length."""
        if not isinstance(self.value, list) or not least <= len(self.value) <= most:
            count = str(least) if least == most else f"{least:,} to {most:,}"
            self.fail(f"is {shown(self.value)}, not a list of {count} entries")
        return (Node(entry, f"{self.where}[{i}]") for i, entry in enumerate(self.value))

    def integer(self, least: int, most: int) -> int:
        """An integer within bounds."""
        value = self.value
        if type(value) is not int or not least <= value <= most:
            self.fail(f"is {shown(value)}, not an integer from {least:,} to {most:,}")
        return value

    def integers(self, least: int, most: int, length: tuple[int, int]) -> tuple[int, ...]:
        """A list of integers, both bounded."""
        return tuple(node.integer(least, most) for node in self.items(*length))

    def places(self, length: int, count: int) -> tuple[int, ...]:
        """Up to ``count`` positions of range(length), ascending."""
        found = self.integers(0, length - 1, (0, count))
        if any(b <= a for a, b in pairwise(found)):
            self.fail("is not in ascending order")
        return found

    def number(self) -> float:
        """A number that a float32 can hold."""
        value = self.value
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 3.5e38:
            self.fail(f"is {shown(value)}, not a number of sane size")
        return float(value)

    def numbers(self, least: int, most: int) -> tuple[float, ...]:
        """A list of numbers, of bounded length."""
        return tuple(node.number() for node in self.items(least, most))

    def text(self, pattern: str) -> str:
        """A string that a regular expression matches as a whole."""
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            self.fail(f"is {shown(self.value)}, which cannot be")
        return self.value

    def choice(self, *known: Any) -> Any:
        """One of a few values."""
        if not any(type(self.value) is type(one) and self.value == one for one in known):
            self.fail(f"is {shown(self.value)}; it must be {' or '.join(map(repr, known))}")
        return self.value
