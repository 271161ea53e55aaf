"""quantise_fp8: weights to FP8 (E4M3), one E8M0 scale per tile of b x c, by a scale rule.

The lossy cast of a weight; lossless wherever that is possible. Definition; bit-stable: a tile's
result depends on its own values only, through exact operations and sums of a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.blocks_torch import join_blocks, split_blocks
from dsv4_quant.kernels.operands_torch import check_float, check_group
from dsv4_quant.kernels.quantise_blocks_torch import quantise_blocks
from dsv4_quant.kernels.quantised_torch import Quantised


def quantise_fp8(
    x: Tensor,
    rule: ScaleRule = ScaleRule.LEAST_SQUARES,
    block: tuple[int, int] = FP8_BLOCK,
) -> Quantised:
    """Quantise the tiles of matrices.

    Round to nearest, ties to even, saturating at 448. -0, and a negative value that rounds to zero,
    is code 0x80 (-0). A tile of zeros has scale 2**-22. A tile that some scale holds exactly comes
    back exactly, under either rule: so quantising is idempotent.

    Args:
        x: ``[..., R, C]``, float32 or bfloat16, any strides. Tiles at the edges may be ragged.
        rule: how scales are chosen.
        block: rows and columns of a tile.

    Returns:
        codes ``[..., R, C]``, scales ``[..., ceil(R / b), ceil(C / c)]``, and the cost.
    """
    check_float(x)
    check_group(min(block))
    blocks = split_blocks(x.float(), block)  # [..., h, w, b * c]
    result = quantise_blocks(blocks, "fp8", rule)
    codes = join_blocks(result.codes, block, (x.shape[-2], x.shape[-1]))
    return result._replace(codes=codes)
