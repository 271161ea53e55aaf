"""fp8_gemm: quantised activations times an FP8 weight.

Definition; bit-stable. The products of one step, where both scales are constant, are multiples of
2**-18 below 2**18, so float64 sums up to 2**17 of them without rounding and their order does not
matter; the steps are added in the order of K. No thread count, batch or BLAS moves a bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.block_dequant_torch import decode_codes
from dsv4_quant.kernels.defaults import ACT_GROUP, FP8
from dsv4_quant.kernels.operands_torch import (
    FLOATS,
    as_bytes,
    check_group,
    scale_values,
    weight_shape,
)

ACTIVATIONS = FP8
"""What act_quant makes: E4M3 codes. Only the kind counts here, the group is an argument."""


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP8,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``dequant(x) @ dequant(weight).T``, summed in float64, rounded to float32, then to dtype.

    NaN codes and NaN scales make NaN of every sum that they enter. A sum that is zero is +0.

    Args:
        x, x_scales: what act_quant returns: codes ``[..., K]``, E8M0 ``[..., ceil(K / group)]``.
        weight: codes ``[N, K]``.
        weight_scales: ``[ceil(N / b), ceil(K / c)]``, E8M0 bytes or float32.
        fmt: format of the weight, an ``fp8`` one.
        group: values of x that share a scale.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        ``[..., N]`` of dtype.
    """
    check_fp8(fmt)
    return scaled_matmul(x, x_scales, weight, weight_scales, fmt, group, dtype)


def scaled_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of fp8_gemm and fp4_gemm, step by step along K."""
    rows, cols, step = check_operands(x, x_scales, weight, weight_scales, fmt, group, dtype)
    assert fmt.block is not None
    leading = x.shape[:-1]
    x, weight = as_bytes(x).reshape(leading.numel(), cols), as_bytes(weight)  # [M, K]
    x_factors = scale_values(x_scales).reshape(leading.numel(), -(-cols // group)).double()
    w_factors = scale_values(weight_scales).repeat_interleave(fmt.block[0], 0)[:rows].double()
    per_byte = 2 if fmt.kind == "fp4" else 1
    out = torch.zeros(x.shape[0], rows, dtype=torch.float64, device=x.device)
    for k in range(0, cols, step):
        a = decode_codes(x[:, k : k + step], ACTIVATIONS, torch.float64)  # [M, step]
        b = decode_codes(weight[:, k // per_byte : (k + step) // per_byte], fmt, torch.float64)
        factor = x_factors[:, k // group, None] * w_factors[:, k // fmt.block[1]]  # [M, N]
        out += (a @ b.T) * factor
    return out.float().to(dtype).view(*leading, rows)


def check_fp8(fmt: Format) -> None:
    """A ValueError for a weight that is not FP8."""
    if fmt.kind != "fp8":
        raise ValueError(f"fp8_gemm takes an FP8 weight, not {fmt}")


def check_operands(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format,
    group: int,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """Rows N and columns K of the weight, and the step along K in which both scales are constant.

    ValueError or TypeError for operands that do not fit each other.
    """
    if dtype not in FLOATS:
        raise TypeError(f"results are float32 or bfloat16, not {dtype}")
    check_group(group)
    if weight.dim() != 2:
        raise ValueError(f"a weight has two axes, not {weight.dim()}")
    rows, cols = weight_shape(weight, weight_scales, fmt)
    groups = -(-cols // group)
    if x.shape[-1] != cols or tuple(x_scales.shape) != (*x.shape[:-1], groups):
        raise ValueError(
            f"activations {tuple(x.shape)} with scales {tuple(x_scales.shape)} do not fit "
            f"a weight of {rows} x {cols} and groups of {group}"
        )
    assert fmt.block is not None
    return rows, cols, math.gcd(group, fmt.block[1])
