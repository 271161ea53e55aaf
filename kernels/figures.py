"""The figures of a lossy cast panel by panel, and how they add up to a Cost that no panel changes.

float64 sums depend on their order. Here it is part of the definition, on three levels:

1. within a block, by halves (:class:`dsv4_quant.formats.rules.ScaleRule`);
2. within a row of blocks, one block after the other, from left to right;
3. within a weight, one row of blocks after the other, from the top.

A panel holds whole rows of blocks, so its figures keep one sum for each of them. All else is
counted, or is a largest value, and has no order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.cost import Cost
from dsv4_quant.kernels.jit_numba import expect

VALUES, SATURATED, FLUSHED, BLOCKS, EXACT = range(5)
"""Where in :attr:`Figures.counts` what is counted."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figures:
    """What casting one panel of h rows of blocks cost. The casts overwrite all of it."""

    value_squares: Doubles
    """``[h]`` sum of v**2."""
    error_squares: Doubles
    """``[h]`` sum of (v - w)**2."""
    largest_error: NDArray[np.float32]
    """``[1]`` largest |v - w|; always exact."""
    counts: NDArray[np.int64]
    """``[5]`` values, saturated values, flushed values, blocks, exact blocks."""
    scales: NDArray[np.int64]
    """``[256]`` how many blocks have this scale byte; all 0 where there are no scales."""

    def begin(self, h: int, values: int, blocks: int) -> None:
        """Forget the panel before. A ValueError unless this has room for h rows of blocks."""
        for name in ("value_squares", "error_squares"):
            sums = getattr(self, name)
            expect(name, sums, np.float64, (h,))
            sums[:] = 0
        self.counts[:] = values, 0, 0, blocks, 0
        self.largest_error[:] = self.scales[:] = 0

    @classmethod
    def empty(cls, h: int) -> Figures:
        """Room for the figures of h rows of blocks."""
        return cls(
            value_squares=np.zeros(h),
            error_squares=np.zeros(h),
            largest_error=np.zeros(1, np.float32),
            counts=np.zeros(5, np.int64),
            scales=np.zeros(256, np.int64),
        )


def cost(panels: Iterable[Figures]) -> Cost:
    """The cost of one weight from the figures of all its panels, which come from top to bottom."""
    held = list(panels)
    counts = [sum(int(figures.counts[at]) for figures in held) for at in range(5)]
    scales = sum((figures.scales for figures in held), np.zeros(256, np.int64))
    return Cost(
        values=counts[VALUES],
        value_squares=_total([figures.value_squares for figures in held]),
        error_squares=_total([figures.error_squares for figures in held]),
        largest_error=max((float(figures.largest_error[0]) for figures in held), default=0.0),
        saturated=counts[SATURATED],
        flushed=counts[FLUSHED],
        blocks=counts[BLOCKS],
        exact_blocks=counts[EXACT],
        exponents=Counter({int(s) - e8m0.BIAS: int(scales[s]) for s in np.flatnonzero(scales)}),
    )


def in_order(sums: Doubles) -> Doubles:
    """Sums along the last axis from first to last, ``[..., n]`` to ``[...]``.

    numpy's ``sum`` has an order of its own; its ``cumsum`` cannot.
    """
    begun = np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)
    return cast(Doubles, np.cumsum(begun, axis=-1)[..., -1])


def _total(panels: list[Doubles]) -> float:
    return float(in_order(np.concatenate([np.zeros(0), *panels])))
