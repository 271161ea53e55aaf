"""quantise_fp4: weights to FP4 (E2M1), one E8M0 scale per 1 x group, by a scale rule.

The lossy cast of a weight; lossless wherever that is possible. Definition; bit-stable: a block's
result depends on its own values only, through exact operations and sums of a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.blocks_torch import join_blocks, split_blocks
from dsv4_quant.kernels.defaults import FP4_GROUP
from dsv4_quant.kernels.fp4_act_quant_torch import check_even
from dsv4_quant.kernels.operands_torch import check_float
from dsv4_quant.kernels.quantise_blocks_torch import quantise_blocks
from dsv4_quant.kernels.quantised_torch import Quantised


def quantise_fp4(
    x: Tensor, rule: ScaleRule = ScaleRule.LEAST_SQUARES, group: int = FP4_GROUP
) -> Quantised:
    """Quantise the rows of matrices in groups and pack two codes per byte, the even column low.

    Round to nearest, ties to even, saturating at 6. -0, and a negative value that rounds to zero,
    is code 0 (+0). A group of zeros has scale 2**-126. A group that some scale holds exactly comes
    back exactly, under either rule: so quantising is idempotent.

    Args:
        x: ``[..., R, C]``, C even, float32 or bfloat16, any strides. The last group may be short.
        rule: how scales are chosen.
        group: values along C that share a scale, an even number.

    Returns:
        packed codes ``[..., R, C / 2]``, scales ``[..., R, ceil(C / group)]``, and the cost.
    """
    check_float(x)
    check_even(x, group)
    blocks = split_blocks(x.float(), (1, group))  # [..., R, G, group]
    result = quantise_blocks(blocks, "fp4", rule)
    codes = join_blocks(result.codes, (1, group), (x.shape[-2], x.shape[-1]))
    return result._replace(codes=codes[..., 0::2] | codes[..., 1::2] << 4)
