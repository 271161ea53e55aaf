"""fp4_to_bf16: FP4 weights to BF16, exact for every scale up to 2**125, and saying so.

What block_dequant gives, in the canonical form that the value digest hashes: code 8 (-0) becomes
+0, and a NaN is 0x7FC0. Definition; bit-stable: each value is one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.kernels.block_dequant_torch import block_dequant
from dsv4_quant.kernels.operands_torch import as_bytes
from dsv4_quant.kernels.verdicts import INEXACT, NAN


def fp4_to_bf16(codes: Tensor, scales: Tensor, fmt: Format = FP4) -> tuple[Tensor, Tensor]:
    """Decode a stack of matrices.

    BF16 has FP4's two significant bits and E8M0's exponents. Only at the top they part: 4 and 6
    times 2**126, and 2 to 6 times 2**127, are beyond BF16 and become infinities.

    Args:
        codes: ``[..., R, C / 2]``, low nibble first, bytes.
        scales: ``[..., h, w]`` E8M0 bytes.
        fmt: FP4 in any blocks.

    Returns:
        values ``[..., R, C]``, bfloat16, and flags ``[...]``, int32, one per matrix: INEXACT where
        a value is beyond BF16, NAN where a scale is 0xFF.
    """
    check_kind(fmt, "fp4")
    values = block_dequant(codes, scales, fmt) + 0.0  # -0 + 0 = +0
    nan = (as_bytes(scales) == e8m0.NAN).flatten(-2).any(-1)
    flags = values.isinf().flatten(-2).any(-1) * INEXACT | nan * NAN
    return values.masked_fill(values.isnan(), torch.nan), flags.int()


def check_kind(fmt: Format, kind: str) -> None:
    """A ValueError for a format of another kind."""
    if fmt.kind != kind:
        raise ValueError(f"decodes {kind}, not {fmt}")
