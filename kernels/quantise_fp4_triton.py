"""quantise_fp4, the twin: bit for bit what the definition gives."""

from __future__ import annotations

from torch import Tensor

from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.defaults import FP4_GROUP
from dsv4_quant.kernels.fp4_act_quant_torch import check_even
from dsv4_quant.kernels.operands_torch import check_float
from dsv4_quant.kernels.quantise_blocks_triton import quantise_blocks
from dsv4_quant.kernels.quantised_torch import Quantised


def quantise_fp4(
    x: Tensor, rule: ScaleRule = ScaleRule.LEAST_SQUARES, group: int = FP4_GROUP
) -> Quantised:
    """See the definition, ``quantise_fp4_torch.quantise_fp4``."""
    check_float(x)
    check_even(x, group)
    return quantise_blocks(x, "fp4", rule, (1, group))
