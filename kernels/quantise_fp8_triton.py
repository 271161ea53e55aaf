"""quantise_fp8, the twin: bit for bit what the definition gives."""

from __future__ import annotations

from torch import Tensor

from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.operands_torch import check_float, check_group
from dsv4_quant.kernels.quantise_blocks_triton import quantise_blocks
from dsv4_quant.kernels.quantised_torch import Quantised


def quantise_fp8(
    x: Tensor,
    rule: ScaleRule = ScaleRule.LEAST_SQUARES,
    block: tuple[int, int] = FP8_BLOCK,
) -> Quantised:
    """See the definition, ``quantise_fp8_torch.quantise_fp8``."""
    check_float(x)
    check_group(min(block))
    return quantise_blocks(x, "fp8", rule, block)
