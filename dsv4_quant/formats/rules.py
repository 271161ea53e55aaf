"""How a block of values gets its scale: the rule that every lossy cast takes as an argument.

A block has n values v, a scale ``S = 2**s`` with s from -127 to 127, and a grid of code values, top
being the largest: 6 for FP4, 448 for FP8. A value becomes the grid point nearest to v / S, ties to
the even code; what lies beyond top saturates.

``s_max`` is the smallest s with ``max |v| <= top * 2**s``, and never below -127. A block of zeros
has no such s; it takes what the published quantiser gives it: :data:`ZERO_EXPONENTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Literal

Element = Literal["fp4", "fp8"]

MIN_EXPONENT = -127
"""The smallest exponent that an E8M0 scale can have."""

ZERO_EXPONENTS: Mapping[Element, int] = {"fp4": -126, "fp8": -22}
"""Scale exponents of blocks of zeros. The published quantiser takes no FP4 block for smaller than
``6 * 2**-126`` and no FP8 block for smaller than 1e-4: ``2**ceil(log2(1e-4 / 448))``. Blocks of
small values do not feel that floor here: they take their own ``s_max``."""

MARGIN = 1 - 2.0**-40
"""A smaller exponent must have less than this share of the error of the best larger one. A sum of n
squares, folded by halves, is off by ``log2(n) * 2**-53`` of itself at most, which is far less: so
no rounding of sums makes a block worse than under MAX."""


FP8_LOSING = 240.0
"""An FP8 block with such a value, in units of 2**s_max, keeps s_max (:func:`candidates`): nine in
ten do, and need not try."""


class ScaleRule(Enum):
    """Which power of two a block takes.

    MAX
        ``s = s_max``, the published quantiser's: nothing saturates. Every grid of a larger exponent
        is coarser: its points up to ``top * 2**s_max`` are points of this grid too.
    LEAST_SQUARES
        Of ``s_max, s_max - 1, ...`` (:func:`candidates`) the one with the least
        ``E = sum((v - code * S)**2)``. A finer grid for the many small values can be worth the
        saturation of the few large ones. Never worse than MAX in any block, at up to twice the
        work; but the largest values of a block, the ones that MAX protects, may shrink.

    E is defined to the last bit, so that every implementation chooses alike. All of it is float64.
    The squares are exact. They are laid out row-major, the block at its full size even where the
    tensor ends within it, filled up with zeros to a power of two, and folded:
    ``x[0 : n/2] + x[n/2 : n]`` until one is left. Larger exponents win ties (see :data:`MARGIN`).
    """

    MAX = "max"
    LEAST_SQUARES = "least-squares"


def candidates(rule: ScaleRule, element: Element, values: int) -> int:
    """How many exponents, from ``s_max`` downwards, can have the least error in a block.

    Under LEAST_SQUARES at most 4 for FP4 and 2 for FP8. Of these, ``s_max - k`` is left out where
    it cannot win; in units of S = 2**s_max:

    FP4: the largest value a is above 3 (else s_max were smaller). Under ``s_max - k`` it saturates
    at ``t = 6 / 2**k``; under s_max its error is at most ``|a - 3|``; so its square grows by
    ``(a - t)**2 - (a - 3)**2 >= (3 - t)**2``. No other value's square shrinks by more than 1/16:
    up to 2 the grid's steps are 1/2, and beyond 2 a saturated value is farther from t than from the
    grid point below it. So k needs ``(values - 1) / 16 > (3 - t)**2``, which for blocks of 32
    leaves s_max and s_max - 1.

    FP8: likewise a is above 224, its square grows by ``112**2`` or more from k = 2 on, and others
    gain ``2**-20`` each, in the subnormals: no block is large enough for k = 2. For k = 1 the
    square grows by ``(a - 224)**2`` less that of a's error under s_max, which is 256 or more from
    a = 240 on: a block that holds a value of :data:`FP8_LOSING` * S has nothing to gain either.
    """
    if rule is ScaleRule.MAX:
        return 1
    if element == "fp8":
        return 2
    count = 2
    while count < 4 and (values - 1) / 16 > (3 - 6 / 2**count) ** 2:
        count += 1
    return count
