"""fp4_act_quant: activations to FP4 (E2M1), one power-of-two scale per group along K.

What the indexer's queries and keys go through after their Hadamard rotation in the ``deployed``
arithmetic. Definition; bit-stable in the way of act_quant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e2m1
from dsv4_quant.kernels.act_quant_torch import ceil_scale, split_groups
from dsv4_quant.kernels.defaults import FP4_AMAX_FLOOR, FP4_GROUP
from dsv4_quant.kernels.operands_torch import check_float, check_group, scale_values


def fp4_act_quant(x: Tensor, group: int = FP4_GROUP) -> tuple[Tensor, Tensor]:
    """Quantise groups of the last axis and pack two codes per byte, the even column low.

    ``amax = max(|x|, 6 * 2**-126)``, ``scale = 2**ceil(log2(amax / 6))``,
    ``code = e2m1(x / scale)`` to nearest, ties to even. A negative value that rounds to zero is
    code 8 (-0).
    A group that holds an infinity or a NaN is NaN as a whole: scale 0xFF and every code 0, because
    FP4 has no code for NaN.

    Args:
        x: ``[..., K]``, K even, float32 or bfloat16, any strides. The last group may be short.
        group: values that share a scale, an even number.

    Returns:
        packed codes ``[..., K / 2]`` and scales ``[..., ceil(K / group)]`` (E8M0), both uint8.
    """
    check_float(x)
    check_even(x, group)
    grouped = split_groups(x.float(), group)  # [..., G, group]
    amax = grouped.abs().amax(-1).clamp_min(FP4_AMAX_FLOOR)  # [..., G]
    scales = ceil_scale(amax, e2m1.MAX)
    scaled = grouped / scale_values(scales)[..., None]
    codes = torch.where(scaled.isnan(), 0, _nearest(scaled)).flatten(-2)  # [..., G * group]
    codes = codes[..., : x.shape[-1]]
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def check_even(x: Tensor, group: int) -> None:
    """A ValueError for codes or groups that would begin in the middle of a byte."""
    check_group(group)
    if x.shape[-1] % 2 or group % 2:
        raise ValueError(
            f"two codes share a byte: K and group must be even, not {x.shape[-1]} and {group}"
        )


def _nearest(values: Tensor) -> Tensor:
    """Codes of the nearest E2M1 values, ties to the even code, uint8."""
    grid = torch.tensor(e2m1.VALUES[:8]).to(values.device)
    midpoints = (grid[1:] + grid[:-1]) / 2  # exact
    magnitude = values.abs()
    below = torch.bucketize(magnitude, midpoints)  # a midpoint goes down ...
    above = torch.bucketize(magnitude, midpoints, right=True)  # ... or up
    code = torch.where(below % 2 == 0, below, above)
    return (code | values.signbit().long() << 3).to(torch.uint8)
