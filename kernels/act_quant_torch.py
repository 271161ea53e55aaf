"""act_quant: activations to FP8 (E4M3), one power-of-two scale per group along K.

The quantiser in front of every linear with FP8 or FP4 weights in the ``deployed`` arithmetic.
Definition; bit-stable: every value depends on its own group only, through exact operations and one
rounding, so threads, batch and machine do not matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_quant.formats import e4m3, e8m0
from dsv4_quant.kernels.defaults import ACT_AMAX_FLOOR, ACT_GROUP
from dsv4_quant.kernels.operands_torch import check_float, check_group, scale_values


def act_quant(x: Tensor, group: int = ACT_GROUP) -> tuple[Tensor, Tensor]:
    """Quantise groups of the last axis.

    ``amax = max(|x|, 1e-4)``, ``scale = 2**ceil(log2(amax / 448))``, ``code = e4m3(x / scale)`` to
    nearest, ties to even. Nothing saturates: the scale is never smaller than ``amax / 448``.
    A group that holds an infinity or a NaN is NaN as a whole: scale 0xFF and every code 0x7F.

    Args:
        x: ``[..., K]``, float32 or bfloat16, any strides. The last group may be short.
        group: values that share a scale.

    Returns:
        codes ``[..., K]`` (E4M3) and scales ``[..., ceil(K / group)]`` (E8M0), both uint8.
    """
    check_float(x)
    check_group(group)
    grouped = split_groups(x.float(), group)  # [..., G, group]
    amax = grouped.abs().amax(-1).clamp_min(ACT_AMAX_FLOOR)  # [..., G]
    scales = ceil_scale(amax, e4m3.MAX)
    scaled = grouped / scale_values(scales)[..., None]
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(scaled.isnan(), e4m3.NAN_CODES[0], codes)
    return codes.flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def split_groups(x: Tensor, group: int) -> Tensor:
    """``[..., K]`` -> ``[..., ceil(K / group), group]``, the last group filled with zeros."""
    groups = -(-x.shape[-1] // group)
    padded = F.pad(x.contiguous(), (0, groups * group - x.shape[-1]))
    return padded.reshape(*x.shape[:-1], groups, group)


def ceil_scale(amax: Tensor, top: float) -> Tensor:
    """The E8M0 byte of the smallest power of two with ``amax <= top * 2**k``.

    That is ``2**ceil(log2(amax / top))`` without the rounding of a logarithm or a division. 0xFF
    where amax is not finite.
    """
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent, 0.5 <= fraction < 1
    top_fraction, top_exponent = torch.frexp(torch.tensor(top))
    k = exponent - int(top_exponent) + (fraction > float(top_fraction)).int()
    byte = torch.where(amax.isfinite(), k + e8m0.BIAS, e8m0.NAN)
    return byte.to(torch.uint8)
