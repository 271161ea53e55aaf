"""What quantise_fp4 and quantise_fp8 give: codes, scales, and what that cost, block by block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.cost import Cost
from dsv4_quant.kernels.figures import EXACT, FLUSHED, SATURATED, Figures, cost, in_order


class Quantised(NamedTuple):
    """A weight in blocks, and what that cost in each block. h x w blocks per matrix.

    codes            ``[..., R, C]`` E4M3, or ``[..., R, C / 2]`` E2M1, low nibble first; uint8
    scales           ``[..., h, w]`` E8M0, uint8; 0xFF: the block is refused
    value_squares    ``[..., h, w]`` sum of v**2, float64
    error_squares    ``[..., h, w]`` sum of (v - code * S)**2, float64; 0 means exact
    largest_errors   ``[..., h, w]`` max abs(v - code * S), float32 (always exact)
    saturated        ``[..., h, w]`` how many values are beyond the largest code: abs(v) > top * S
    flushed          ``[..., h, w]`` how many values became zero and were not; both int32

    A block that holds an infinity or a NaN has no codes: it is refused. Its scale is 0xFF, its
    codes are NaN in FP8 and 0 in FP4, and all else about it is 0. Nobody may write such a result.
    """

    codes: Tensor
    scales: Tensor
    value_squares: Tensor
    error_squares: Tensor
    largest_errors: Tensor
    saturated: Tensor
    flushed: Tensor


def statistics(result: Quantised, values: int) -> list[Cost]:
    """What every matrix of a stack cost, in the stack's order; the same as the CPU casts say.

    The float64 sums are taken in the order of :mod:`dsv4_quant.kernels.figures`, so that they too
    have the same bits whoever computed the blocks. A ValueError if a block was refused: what
    nobody may write has no cost.

    Args:
        result: of quantise_fp4 or quantise_fp8, on any device.
        values: how many values one matrix holds.
    """
    *stack, h, w = result.scales.shape
    matrices = math.prod(stack)
    parts = [part.cpu().numpy().reshape(matrices, h, w) for part in result[1:]]
    if (parts[0] == e8m0.NAN).any():
        raise ValueError("a block with an infinity or a NaN was refused: it has no cost")
    return [cost([_figures([part[i] for part in parts], values)]) for i in range(matrices)]


def _figures(parts: list[NDArray[Any]], values: int) -> Figures:
    """One matrix as a single panel; parts ``[h, w]`` are those of a Quantised but the codes."""
    scales, value_squares, error_squares, largest_errors, saturated, flushed = parts
    figures = Figures.empty(len(scales))
    figures.begin(len(scales), values, scales.size)
    figures.value_squares[:] = in_order(value_squares)
    figures.error_squares[:] = in_order(error_squares)
    figures.largest_error[:] = largest_errors.max(initial=0)
    figures.counts[SATURATED] = saturated.sum(dtype=np.int64)
    figures.counts[FLUSHED] = flushed.sum(dtype=np.int64)
    figures.counts[EXACT] = (error_squares == 0).sum()
    figures.scales[:] = np.bincount(scales.reshape(-1), minlength=256)
    return figures
