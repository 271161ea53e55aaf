"""Axes: from values to places, and round numbers to mark on them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """From low to high over a length in pixels."""

    low: float
    high: float
    length: float

    def at(self, value: float) -> float:
        """Where a value lies; those beyond an end lie on it."""
        share = (value - self.low) / ((self.high - self.low) or 1)
        return min(max(share, 0.0), 1.0) * self.length


def ticks(low: float, high: float, count: int) -> list[int]:
    """At most count + 1 multiples of 1, 2 or 5 times a power of ten, within low and high."""
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= count)
    first = math.ceil(low / step) * step
    return list(range(first, math.floor(high) + 1, step))
