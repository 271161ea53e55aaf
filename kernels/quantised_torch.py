"""What quantise_fp4 and quantise_fp8 give: codes, scales, and what that cost, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dsv4_quant.formats import e8m0


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


@dataclass(frozen=True, slots=True)
class Statistics:
    """What quantising one matrix cost: the blocks' figures, added up."""

    values: int
    value_squares: float
    error_squares: float
    largest_error: float
    saturated: int
    flushed: int
    blocks: int
    exact_blocks: int
    refused_blocks: int


def statistics(result: Quantised, values: int) -> list[Statistics]:
    """Add up the blocks of every matrix of a stack, in its order.

    The float64 sums are taken one block after the other, row-major, so that they too have the same
    bits whoever computed the blocks. Of refused blocks only the number counts.

    Args:
        result: of quantise_fp4 or quantise_fp8, on any device.
        values: how many values one matrix holds.
    """
    *stack, h, w = result.scales.shape
    matrices = math.prod(stack)
    scales, *figures = (part.cpu().numpy().reshape(matrices, h * w) for part in result[1:])
    value_squares, error_squares, largest_errors, saturated, flushed = figures
    refused = scales == e8m0.NAN
    return [
        Statistics(
            values=values,
            value_squares=_in_order(value_squares[i]),
            error_squares=_in_order(error_squares[i]),
            largest_error=float(largest_errors[i].max(initial=0)),
            saturated=int(saturated[i].sum(dtype=np.int64)),
            flushed=int(flushed[i].sum(dtype=np.int64)),
            blocks=scales.shape[1],
            exact_blocks=int(((error_squares[i] == 0) & ~refused[i]).sum()),
            refused_blocks=int(refused[i].sum()),
        )
        for i in range(matrices)
    ]


def _in_order(sums: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """One after the other: numpy's ``sum`` has an order of its own, its ``cumsum`` cannot."""
    return float(np.cumsum(sums)[-1]) if sums.size else 0.0
