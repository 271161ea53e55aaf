"""fp4_gemm, the twin: float32 sums instead of float64 ones, within ``bounds_torch.gemm_bound``."""

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.defaults import ACT_GROUP
from dsv4_quant.kernels.fp4_gemm_torch import check_fp4
from dsv4_quant.kernels.fp8_gemm_triton import scaled_matmul


def fp4_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP4,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See the definition, ``fp4_gemm_torch.fp4_gemm``; the kernel is that of fp8_gemm."""
    check_fp4(fmt, group)
    return scaled_matmul(x, x_scales, weight, weight_scales, fmt, group, dtype)
