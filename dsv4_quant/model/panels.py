"""A few rows of a stored weight at a time, decoded to float32.

A weight is never decoded whole: a product walks through it in panels that stay in the cache
(``linear``). So what memory holds of a layer is its codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.kernels.jit_numba import kernel

Floats = NDArray[np.float32]


def decode_panel(weight: Tensor, start: int, stop: int, out: Floats) -> None:
    """Rows [start, stop) of a weight ``[N, K]`` into ``out[: stop - start, :K]``; always exact
    for power-of-two scales, else rounded once."""
    codes, panel = weight.codes[start:stop], out[: stop - start, : weight.shape[1]]
    if weight.format.kind == "fp4":
        assert weight.scales is not None
        _decode_fp4(codes, weight.scales[start:stop], e2m1.VALUES, e8m0.VALUES, panel)
    elif weight.format.kind == "fp8":
        assert weight.scales is not None and weight.format.block is not None
        b, c = weight.format.block
        held = weight.scales[start // b : -(-stop // b)]
        factors = np.take(e8m0.VALUES, held) if weight.format.scale == "e8m0" else held
        _decode_fp8(codes, factors, start % b, b, c, e4m3.VALUES, panel)
    elif weight.format.kind == "bf16":
        _decode_bf16(codes, panel.view(np.uint32))
    elif weight.format.kind == "f32":
        panel[:] = codes
    else:
        raise TypeError(f"{weight.format} holds no float values")


@kernel
def _decode_fp4(
    codes: NDArray[np.uint8], scales: NDArray[np.uint8], values: Floats, powers: Floats, out: Any
) -> None:
    for row in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = powers[scales[row, block]]
            pairs = codes[row, 16 * block : 16 * (block + 1)]
            into = out[row, 32 * block : 32 * (block + 1)]
            for i in range(pairs.size):
                into[2 * i] = values[pairs[i] & 15] * scale
                into[2 * i + 1] = values[pairs[i] >> 4] * scale


@kernel
def _decode_fp8(
    codes: NDArray[np.uint8], scales: Floats, skipped: int, b: int, c: int, values: Floats, out: Any
) -> None:
    """skipped: rows of the first block that come before the panel."""
    for row in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = scales[(skipped + row) // b, block]
            some = codes[row, c * block : c * (block + 1)]
            into = out[row, c * block : c * (block + 1)]
            for i in range(some.size):
                into[i] = values[some[i]] * scale


@kernel
def _decode_bf16(codes: NDArray[np.uint16], out: Any) -> None:
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            out[row, i] = np.uint32(codes[row, i]) << np.uint32(16)
