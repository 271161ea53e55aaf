"""What quantise_fp4 and quantise_fp8 share: blocks of weights to codes under a scale rule.

The definition of the lossy casts, in float64, where all of it is exact but the sums of squares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_quant.formats import e2m1, e4m3, e8m0
from dsv4_quant.formats.rules import (
    MARGIN,
    MIN_EXPONENT,
    ZERO_EXPONENTS,
    Element,
    ScaleRule,
    candidates,
)
from dsv4_quant.kernels.blocks_torch import fold_sum
from dsv4_quant.kernels.operands_torch import scale_values
from dsv4_quant.kernels.quantised_torch import Quantised

GRIDS = {"fp4": e2m1.VALUES[:8], "fp8": e4m3.VALUES[: e4m3.NAN_CODES[0]]}
"""The values of the codes without a sign; the last one is the largest."""


def quantise_blocks(blocks: Tensor, element: Element, rule: ScaleRule) -> Quantised:
    """Codes, one to a byte, and scales of blocks.

    Args:
        blocks: ``[..., h, w, n]`` float32, n values that share a scale; zeros where there are none.
        element: what the codes are.
        rule: what the scales are.

    Returns:
        A Quantised with codes ``[..., h, w, n]``.
    """
    refused = ~blocks.isfinite().all(-1)  # [..., h, w]
    values = blocks.double().masked_fill(refused[..., None], 0)
    grid = torch.tensor(GRIDS[element]).to(blocks.device, torch.float64)
    exponents = max_exponents(values, element)  # [..., h, w]
    codes, errors = _round(values, exponents, grid)  # [..., h, w, n]
    best, top = fold_sum(errors.square()), exponents
    for step in range(1, candidates(rule, element, blocks.shape[-1])):
        tried = (top - step).clamp_min(MIN_EXPONENT)
        tried_codes, tried_errors = _round(values, tried, grid)
        sums = fold_sum(tried_errors.square())
        better = sums < best * MARGIN
        best, exponents = torch.where(better, sums, best), torch.where(better, tried, exponents)
        codes = torch.where(better[..., None], tried_codes, codes)
        errors = torch.where(better[..., None], tried_errors, errors)
    beyond = values.abs() > grid[-1] * _powers(exponents)
    sign = _sign(values, codes, element)
    nan = e4m3.NAN_CODES[0] if element == "fp8" else 0
    return Quantised(
        codes=(codes | sign).masked_fill(refused[..., None], nan),
        scales=torch.where(refused, e8m0.NAN, exponents + e8m0.BIAS).to(torch.uint8),
        value_squares=fold_sum(values.square()),
        error_squares=best,
        largest_errors=errors.abs().amax(-1).float(),
        saturated=beyond.sum(-1, dtype=torch.int32),
        flushed=((values != 0) & (codes == 0)).sum(-1, dtype=torch.int32),
    )


def max_exponents(values: Tensor, element: Element) -> Tensor:
    """``s_max`` of blocks ``[..., n]``, int32 ``[...]``: the smallest s with max|v| <= top * 2**s.

    Without the rounding of a logarithm or a division: powers of two are compared as exponents.
    """
    amax = values.abs().amax(-1)
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent, 0.5 <= fraction < 1
    top_fraction, top_exponent = math.frexp(GRIDS[element][-1])
    s = exponent - top_exponent + (fraction > top_fraction).int()
    return torch.where(amax == 0, ZERO_EXPONENTS[element], s.clamp_min(MIN_EXPONENT))


def _powers(exponents: Tensor) -> Tensor:
    """``2**exponents``, float64 ``[..., 1]``: beside the values of a block."""
    return scale_values((exponents + e8m0.BIAS).to(torch.uint8)).double()[..., None]


def _round(values: Tensor, exponents: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes without signs, ties to the even one, saturating; and ``|v| - code * S``."""
    scales = _powers(exponents)
    magnitude = values.abs()
    scaled = magnitude / scales
    midpoints = (grid[1:] + grid[:-1]) / 2
    below = torch.bucketize(scaled, midpoints)  # a midpoint goes down ...
    above = torch.bucketize(scaled, midpoints, right=True)  # ... or up
    codes = torch.where(below % 2 == 0, below, above)
    return codes.to(torch.uint8), magnitude - grid[codes] * scales


def _sign(values: Tensor, codes: Tensor, element: Element) -> Tensor:
    """The sign bit. FP8 keeps it always; FP4's zero has none, as in the published checkpoints."""
    negative = values.signbit()
    if element == "fp8":
        return negative.to(torch.uint8) << 7
    return (negative & (codes > 0)).to(torch.uint8) << 3
