"""fp4_gemm: quantised activations (FP8) times an FP4 weight.

Definition; bit-stable for the reason given in fp8_gemm: here the products of a step are multiples
of 2**-10 below 2**12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.defaults import ACT_GROUP
from dsv4_quant.kernels.fp8_gemm_torch import scaled_matmul


def fp4_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP4,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``dequant(x) @ dequant(weight).T``, summed in float64, rounded to float32, then to dtype.

    NaN codes and NaN scales make NaN of every sum that they enter. A sum that is zero is +0.

    Args:
        x, x_scales: what act_quant returns: codes ``[..., K]``, E8M0 ``[..., ceil(K / group)]``.
        weight: packed codes ``[N, K / 2]``, low nibble first.
        weight_scales: ``[ceil(N / b), ceil(K / c)]``, E8M0 bytes or float32.
        fmt: format of the weight, an ``fp4`` one; ``group`` must be even.
        group: values of x that share a scale.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        ``[..., N]`` of dtype.
    """
    check_fp4(fmt, group)
    return scaled_matmul(x, x_scales, weight, weight_scales, fmt, group, dtype)


def check_fp4(fmt: Format, group: int) -> None:
    """A ValueError for a weight that is not FP4, or a group that ends in the middle of a byte."""
    if fmt.kind != "fp4":
        raise ValueError(f"fp4_gemm takes an FP4 weight, not {fmt}")
    if group % 2:
        raise ValueError(f"a byte holds two codes, so a group must be even, not {group}")
