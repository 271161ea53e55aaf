"""quantise_fp4 on the CPU: a panel of weights to FP4 (E2M1), one E8M0 scale per 1 x group.

The twin of quantise_fp4_torch, which is the definition, bit for bit. Groups of 32 take the fast
road; any other even number works, more slowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.figures import Figures
from dsv4_quant.kernels.quantise_blocks_numba import quantise_blocks

Bytes = NDArray[np.uint8]


def quantise_fp4(
    values: NDArray[Any],
    rule: ScaleRule | None,
    group: int,
    scales: Bytes,
    codes: Bytes | None,
    figures: Figures | None,
    result: NDArray[np.int64],
) -> int:
    """Quantise a panel.

    Args:
        values: ``[R, C]``, C even: BF16 bits as uint16, or float32.
        rule: how scales are chosen; None if ``scales`` holds them already, from an earlier call.
        group: columns per scale, an even number; the last group of a row may be short.
        scales: ``[R, ceil(C / group)]`` E8M0, written.
        codes: ``[R, C / 2]``, low nibble first, written; None where only scales are wanted: they
            precede the codes in a file.
        figures: of R rows, written; None where nobody asks.
        result: ``[3]``: row, column and bits of the first infinity or NaN, if there is one.

    Returns:
        0, or NAN for an infinity or a NaN; then the work stopped there, and what was written, the
        figures too, is of no use.
    """
    if values.shape[1] % 2 or group % 2:
        raise ValueError(f"{values.shape[1]} columns in groups of {group}: both must be even")
    return quantise_blocks(values, "fp4", rule, (1, group), scales, codes, figures, result)
