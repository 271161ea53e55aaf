"""What a lossy cast cost: how far the stored values are from those that were given.

v is a value before, w what its code and scale decode to after. Sums are over a weight, a layer or
a model. They are taken in an order that does not depend on panels, threads or machines: see
:func:`total` and ``kernels.figures``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """The figures of one weight, or of many."""

    values: int = 0
    value_squares: float = 0.0
    """Sum of v**2."""
    error_squares: float = 0.0
    """Sum of (v - w)**2; 0 means that nothing changed."""
    largest_error: float = 0.0
    """Largest |v - w|."""
    saturated: int = 0
    """Values beyond the largest code: |v| > top * S."""
    flushed: int = 0
    """Values that became zero and were not."""
    blocks: int = 0
    exact_blocks: int = 0
    """Blocks of which no value changed."""
    exponents: Counter[int] = field(default_factory=Counter)
    """How many blocks have a scale of 2**s, by s."""

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in dB: ``10 log10(value_squares / error_squares)``.

        Infinite where nothing changed.
        """
        if self.error_squares == 0:
            return math.inf
        if self.value_squares == 0:
            return -math.inf
        return 10 * (math.log10(self.value_squares) - math.log10(self.error_squares))

    @property
    def exact_share(self) -> float:
        """Share of blocks of which no value changed; 1 where there is none."""
        return self.exact_blocks / self.blocks if self.blocks else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; floats are written so that they read back as they are."""
        return {
            "values": self.values,
            "value_squares": self.value_squares,
            "error_squares": self.error_squares,
            "largest_error": self.largest_error,
            "saturated": self.saturated,
            "flushed": self.flushed,
            "blocks": self.blocks,
            "exact_blocks": self.exact_blocks,
            "exponents": {str(s): n for s, n in sorted(self.exponents.items())},
        }

    @classmethod
    def from_json(cls, value: Any) -> Cost:
        """The inverse of to_json. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            values=int(value["values"]),
            value_squares=float(value["value_squares"]),
            error_squares=float(value["error_squares"]),
            largest_error=float(value["largest_error"]),
            saturated=int(value["saturated"]),
            flushed=int(value["flushed"]),
            blocks=int(value["blocks"]),
            exact_blocks=int(value["exact_blocks"]),
            exponents=Counter({int(s): int(n) for s, n in value["exponents"].items()}),
        )


def total(costs: Iterable[Cost]) -> Cost:
    """Of several weights. The sums are correctly rounded (fsum), so their order does not matter."""
    held = list(costs)
    exponents: Counter[int] = Counter()
    for cost in held:
        exponents.update(cost.exponents)
    return Cost(
        values=sum(cost.values for cost in held),
        value_squares=math.fsum(cost.value_squares for cost in held),
        error_squares=math.fsum(cost.error_squares for cost in held),
        largest_error=max((cost.largest_error for cost in held), default=0.0),
        saturated=sum(cost.saturated for cost in held),
        flushed=sum(cost.flushed for cost in held),
        blocks=sum(cost.blocks for cost in held),
        exact_blocks=sum(cost.exact_blocks for cost in held),
        exponents=exponents,
    )
