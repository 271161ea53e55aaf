"""How two weights of the same shape differ, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats.blocks import Tensor


@dataclass(slots=True)
class Difference:
    """Values that differ: how many of how many, the first by row and column, the largest."""

    values: int = 0
    count: int = 0
    row: int = 0
    column: int = 0
    mine: float = 0.0
    theirs: float = 0.0
    largest: float = 0.0

    def add(self, mine: NDArray[Any], theirs: NDArray[Any], first_row: int) -> None:
        """Two matrices of values ``[rows, C]`` that begin at ``first_row``; -0 equals +0."""
        differ = mine != theirs
        if mine.dtype.kind == "f":
            differ &= ~(np.isnan(mine) & np.isnan(theirs))
        count = int(np.count_nonzero(differ))
        if not count:
            return
        row, column = (int(at) for at in np.unravel_index(int(differ.argmax()), differ.shape))
        with np.errstate(invalid="ignore"):
            gaps = np.abs(mine[differ].astype(np.float64) - theirs[differ].astype(np.float64))
        gaps[np.isnan(gaps)] = np.inf
        one, other = mine[row, column].item(), theirs[row, column].item()
        self.join(Difference(0, count, first_row + row, column, one, other, float(gaps.max())))

    def join(self, other: Difference) -> None:
        """Another part of the same weight."""
        if not other.count:
            return
        if not self.count or (other.row, other.column) < (self.row, self.column):
            self.row, self.column = other.row, other.column
            self.mine, self.theirs = other.mine, other.theirs
        self.largest = max(self.largest, other.largest)
        self.count += other.count

    def shown(self) -> str:
        """``12 of 65,536 values differ, the first at [3, 17]: 0.5, not 0.25; by 0.25 at most``."""
        return (
            f"{self.count:,} of {self.values:,} values differ, the first at"
            f" [{self.row}, {self.column}]: {self.mine:.9g}, not {self.theirs:.9g};"
            f" by {self.largest:.3g} at most"
        )


def decoded_rows(panel: Tensor, start: int, stop: int) -> NDArray[Any]:
    """Values ``[stop - start, C]`` of some rows of a panel: float32, or int64 for tables."""
    codes = panel.codes.reshape(-1, panel.codes.shape[-1])[start:stop]
    shape = stop - start, panel.shape[-1]
    if panel.format.kind == "i64":
        return codes
    if not panel.format.is_quantised:
        return Tensor(panel.format, shape, codes).decode()
    assert panel.format.block is not None and panel.scales is not None
    b = panel.format.block[0]
    first = start // b * b  # blocks are whole: decode from the first row of the first one
    rows = panel.codes[first:stop]
    scales = panel.scales[first // b : -(-stop // b)]
    with np.errstate(over="ignore", invalid="ignore"):  # what is damaged may mean anything
        values = Tensor(panel.format, (stop - first, shape[1]), rows, scales).decode()
    return values[start - first :]
