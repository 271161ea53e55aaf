"""quantise_fp8 on the CPU: a panel of weights to FP8 (E4M3), one E8M0 scale per tile of b x c.

The twin of quantise_fp8_torch, which is the definition, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.figures import Figures
from dsv4_quant.kernels.quantise_blocks_numba import quantise_blocks

Bytes = NDArray[np.uint8]


def quantise_fp8(
    values: NDArray[Any],
    rule: ScaleRule | None,
    b: int,
    c: int,
    scales: Bytes,
    codes: Bytes | None,
    figures: Figures | None,
    result: NDArray[np.int64],
) -> int:
    """Quantise a panel that begins at the first row of a tile.

    Args:
        values: ``[R, C]``: BF16 bits as uint16, or float32.
        rule: how scales are chosen; None if ``scales`` holds them already, from an earlier call.
        b, c: rows and columns of a tile; tiles at the edges may be ragged.
        scales: ``[ceil(R / b), ceil(C / c)]`` E8M0, written.
        codes: ``[R, C]``, written; None where only scales are wanted: they precede the codes in a
            file.
        figures: of ``ceil(R / b)`` rows of tiles, written; None where nobody asks.
        result: ``[3]``: row, column and bits of the first infinity or NaN, if there is one.

    Returns:
        0, or NAN for an infinity or a NaN; then the work stopped there, and what was written, the
        figures too, is of no use.
    """
    return quantise_blocks(values, "fp8", rule, (b, c), scales, codes, figures, result)
