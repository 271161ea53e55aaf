"""What was counted in one weight, panel by panel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Spot:
    """How many of something there are; the first, as [row, column], and what is there."""

    count: int
    row: int
    column: int
    value: str

    def __add__(self, other: Spot) -> Spot:
        first = min(self, other, key=lambda spot: (spot.row, spot.column))
        return Spot(self.count + other.count, first.row, first.column, first.value)


@dataclass(slots=True)
class Tally:
    """Counts of one panel, or of a whole weight when its panels have been added."""

    values: int = 0
    blocks: int = 0
    dead: int = 0
    saturated: int = 0
    slack: int = 0
    zero_run: int = 0
    """The longest stretch of values in whole blocks that are all zero."""
    exponents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """How many blocks that are not dead have each scale exponent."""
    bad: Spot | None = None
    """Codes or values that are not finite; for tables of ids, ids that name no expert."""
    bad_scales: Spot | None = None
    """Scales that are NaN, infinite, zero or negative, by block row and block column."""
    huge: Spot | None = None

    def add(self, other: Tally) -> None:
        """Another panel of the same weight."""
        self.values += other.values
        self.blocks += other.blocks
        self.dead += other.dead
        self.saturated += other.saturated
        self.slack += other.slack
        self.zero_run = max(self.zero_run, other.zero_run)
        self.exponents += other.exponents
        self.bad = joined(self.bad, other.bad)
        self.bad_scales = joined(self.bad_scales, other.bad_scales)
        self.huge = joined(self.huge, other.huge)

    def note_bad(self, where: NDArray[np.bool_], first_row: int, values: NDArray[Any]) -> None:
        """Counts where a matrix of flags is set; ``values`` has the same shape."""
        self.bad = joined(self.bad, spot_of(where, first_row, values))

    def note_scales(self, where: NDArray[np.bool_], first_row: int, values: NDArray[Any]) -> None:
        """The same for scales."""
        self.bad_scales = joined(self.bad_scales, spot_of(where, first_row, values))

    def note_huge(self, where: NDArray[np.bool_], first_row: int, values: NDArray[Any]) -> None:
        """The same for values beyond all measure."""
        self.huge = joined(self.huge, spot_of(where, first_row, values))


def spot_of(where: NDArray[np.bool_], first_row: int, values: NDArray[Any]) -> Spot | None:
    """Counts the flags of a matrix whose rows begin at ``first_row``; None if none is set."""
    count = int(np.count_nonzero(where))
    if not count:
        return None
    row, column = (int(at) for at in np.unravel_index(int(where.argmax()), where.shape))
    value = values[row, column]
    shown = f"0x{value:02X}" if values.dtype == np.uint8 else f"{value:.9g}"
    return Spot(count, first_row + row, column, shown)


def joined(one: Spot | None, other: Spot | None) -> Spot | None:
    """Both counted together."""
    return one + other if one is not None and other is not None else one or other
