"""FP8 to float32: ``e4m3 * scale`` per block, where BF16 cannot hold the product.

That is so for float32 scales with more than 4 significant bits; with a power of two every product
is exact in BF16 but at the very ends. Here a product is exact while code and scale have at most 24
significant bits together, and rounded to nearest, ties to even, otherwise.

Dimensions: R rows, C columns of the panel; the tensor's scales are [h, w].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e4m3
from dsv4_quant.kernels.fp8_to_bf16_numba import block_scales
from dsv4_quant.kernels.jit_numba import INEXACT, NAN, expect, kernel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def fp8_to_f32(
    codes: Bytes, scales: Bytes | Floats, row0: int, block_rows: int, block_cols: int, out: Floats
) -> int:
    """Decode a panel. -0 keeps its sign.

    Args:
        codes: ``[R, C]`` E4M3.
        scales: ``[h, w]`` of the whole tensor: uint8 is E8M0, float32 is itself.
        row0: the panel's first row in the tensor.
        block_rows, block_cols: size of a block.
        out: ``[R, C]``, written.

    Returns:
        INEXACT if some product does not exist in float32, NAN if a code or a scale is NaN or a
        scale is infinite; both, or 0.
    """
    met = block_scales(codes, scales, row0, block_rows, block_cols)
    expect("out", out, np.float32, codes.shape)
    return _fp8_to_f32(codes, met, row0 % block_rows, block_rows, e4m3.VALUES, out)


@kernel
def _fp8_to_f32(
    codes: Bytes, scales: Floats, row0: int, block_rows: int, values: Floats, out: Floats
) -> int:
    """The product is exact in float64, so comparing with it finds every rounding.

    Looking up and multiplying are two loops because LLVM vectorises only the second.
    """
    rows, cols = codes.shape
    width = cols // scales.shape[1]
    row_scales = np.empty(cols, np.float64)
    block_row, rounded, special = -1, 0, 0
    for row in range(rows):
        if (row0 + row) // block_rows != block_row:
            block_row = (row0 + row) // block_rows
            for b in range(scales.shape[1]):
                for col in range(b * width, (b + 1) * width):
                    row_scales[col] = scales[block_row, b]
        for col in range(cols):
            out[row, col] = values[codes[row, col]]
        for col in range(cols):
            product = np.float64(out[row, col]) * row_scales[col]
            finite = abs(product) < np.inf
            out[row, col] = product
            rounded += finite & (np.float64(np.float32(product)) != product)
            special += not finite
    return (NAN if special else 0) | (INEXACT if rounded else 0)
