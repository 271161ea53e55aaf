"""block_dequant: quantised weights to numbers.

FP8 with a scale (E8M0 or float32) per block, or FP4 with an E8M0 scale per 1x32. Also takes the
results of act_quant and fp4_act_quant back: they are weights with blocks of one row.
Definition; bit-stable: each value is one product.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv4_quant.formats import e2m1, e4m3
from dsv4_quant.formats.blocks import Format
from dsv4_quant.kernels.operands_torch import (
    FLOATS,
    as_bytes,
    lookup,
    scale_values,
    weight_shape,
)


def block_dequant(
    codes: Tensor, scales: Tensor, fmt: Format, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``value(code) * scale`` in float32, then rounded to dtype.

    With power-of-two scales nothing is rounded, in bfloat16 neither, unless the product leaves the
    range: above it becomes an infinity, below bfloat16's 2**-133 it is rounded.
    A NaN code is a NaN value, a scale 0xFF makes its block NaN; the bits of a NaN are unspecified.

    Args:
        codes: ``[..., N, K]`` (FP8) or ``[..., N, K / 2]`` (FP4, low nibble first), bytes.
        scales: ``[..., ceil(N / b), ceil(K / c)]`` for blocks of b x c: E8M0 bytes or float32.
        fmt: what the codes are and how large a block is; its scale type is read off ``scales``.
        dtype: ``torch.bfloat16`` or ``torch.float32``.

    Returns:
        ``[..., N, K]`` of dtype.
    """
    if dtype not in FLOATS:
        raise TypeError(f"decodes to float32 or bfloat16, not {dtype}")
    rows, cols = weight_shape(codes, scales, fmt)
    assert fmt.block is not None
    values = decode_codes(as_bytes(codes), fmt)  # [..., N, K]
    factors = scale_values(scales).repeat_interleave(fmt.block[0], -2)[..., :rows, :]
    whole, rest = divmod(cols, fmt.block[1])
    inner = values[..., : cols - rest].view(*values.shape[:-1], whole, fmt.block[1])
    inner *= factors[..., :whole, None]  # [..., N, K // c, c]
    if rest:
        values[..., cols - rest :] *= factors[..., whole:]
    return values.to(dtype)


def decode_codes(codes: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of FP8 codes ``[..., K]``, or of FP4 bytes ``[..., K / 2]``: ``[..., K]``."""
    if fmt.kind == "fp8":
        return lookup(codes, torch.tensor(e4m3.VALUES).to(codes.device, dtype))
    pairs = np.stack([np.tile(e2m1.VALUES, 16), np.repeat(e2m1.VALUES, 16)], -1)  # [256, 2]
    return lookup(codes, torch.tensor(pairs).to(codes.device, dtype)).flatten(-2)
