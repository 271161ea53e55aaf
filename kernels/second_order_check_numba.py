"""Whether second-order rounding has won: by inputs that it has not seen.

A factor believes the inputs it was made of; few of them, or of another kind than what comes later,
can mislead it. So some inputs are held out, and rows take their moved codes only where the held-out
outputs ``X e`` of their errors e are smaller than those of plain rounding. UNIT rows of a weight
are judged together: single rows would be judged by chance. Everything is float32 products in one
order and float64 sums, so the answer depends on no thread and no panel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.kernels.jit_numba import kernel

UNIT = 64
"""Rows that are judged together, or fewer where a weight is so wide that panels have fewer."""

LEAST_GAIN = 0.02
"""What is won by less is not worth a code."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def wins(inputs: Floats, plain: Floats, moved: Floats, unit: int = UNIT) -> NDArray[np.bool_]:
    """For each row whether the moved codes are to be taken.

    Args:
        inputs: ``[n, C]``, held out.
        plain: ``[R, C]`` errors ``w - q`` of plain rounding.
        moved: ``[R, C]`` those of second-order rounding.
        unit: rows that are judged together; the first row begins a unit.

    Returns:
        ``[R]``; nowhere without inputs.
    """
    rows = len(plain)
    across = np.ascontiguousarray(inputs.T, np.float32)  # [C, n]
    before, after = output_errors(across, plain), output_errors(across, moved)
    starts = np.arange(0, rows, unit)
    better = np.add.reduceat(after, starts) < (1 - LEAST_GAIN) * np.add.reduceat(before, starts)
    return np.repeat(better, unit)[:rows]


def output_errors(across: Floats, errors: Floats) -> Doubles:
    """``[R]`` sums of squares of ``X e``, for X given as its transpose ``[C, n]``."""
    out = np.zeros(len(errors))
    _output_errors(across, np.ascontiguousarray(errors, np.float32), out)
    return out


@kernel
def _output_errors(across: Floats, errors: Floats, out: Doubles) -> None:
    held = np.empty(across.shape[1], np.float32)
    for row in range(errors.shape[0]):
        held[:] = 0
        for col in range(errors.shape[1]):
            error = errors[row, col]
            if error != 0:
                for i in range(held.size):
                    held[i] += error * across[col, i]
        for i in range(held.size):
            out[row] += np.float64(held[i]) * np.float64(held[i])
