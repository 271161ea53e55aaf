"""fp8_to_bf16: FP8 weights, with E8M0 or float32 scales, to BF16, and whether that was exact.

What block_dequant gives, a NaN being 0x7FC0. Definition; bit-stable: each value is one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.block_dequant_torch import block_dequant, decode_codes
from dsv4_quant.kernels.blocks_torch import spread_blocks
from dsv4_quant.kernels.defaults import FP8
from dsv4_quant.kernels.fp4_to_bf16_torch import check_kind
from dsv4_quant.kernels.operands_torch import as_bytes, scale_values
from dsv4_quant.kernels.verdicts import INEXACT, NAN


def fp8_to_bf16(codes: Tensor, scales: Tensor, fmt: Format = FP8) -> tuple[Tensor, Tensor]:
    """Decode a stack of matrices: the float32 product, rounded to BF16, ties to even.

    With powers of two as scales only the exponent can fail to fit. -0 keeps its sign. An infinite
    scale counts as NaN.

    Args:
        codes: ``[..., R, C]`` E4M3 bytes.
        scales: ``[..., h, w]`` E8M0 bytes or float32.
        fmt: FP8 in any blocks; its scale type is read off ``scales``.

    Returns:
        values ``[..., R, C]``, bfloat16, and flags ``[...]``, int32, one per matrix: INEXACT where
        some product does not exist in BF16, NAN where a code or a scale is NaN, or both.
    """
    check_kind(fmt, "fp8")
    factors = scale_values(scales)
    factors = factors.masked_fill(factors.isinf(), torch.nan)
    values = block_dequant(codes, factors, fmt)
    assert fmt.block is not None
    per_value = spread_blocks(factors, fmt.block, (codes.shape[-2], codes.shape[-1]))
    exact = decode_codes(as_bytes(codes), fmt, torch.float64) * per_value.double()
    inexact = (values.double() != exact) & ~exact.isnan()
    nan = exact.isnan()
    flags = inexact.flatten(-2).any(-1) * INEXACT | nan.flatten(-2).any(-1) * NAN
    return values.masked_fill(nan, torch.nan), flags.int()
