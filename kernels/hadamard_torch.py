"""hadamard: the rotation in front of the indexer's FP4 quantiser.

It spreads outliers over all channels, so that one scale per 32 values serves them better. Applied
to queries and keys alike it leaves their products as they are.
Definition; bit-stable: the order of the sums is the butterfly's, whatever computes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_quant.kernels.operands_torch import check_float


def hadamard(x: Tensor) -> Tensor:
    """``x @ H * D**-0.5`` with Sylvester's Hadamard matrix ``H[i, j] = (-1)**popcount(i & j)``.

    Computed as log2(D) butterfly stages in float32, neighbours first, then scaled, then rounded to
    x's type. The matrix is its own inverse. Infinities and NaN spread as IEEE sums have it.

    Args:
        x: ``[..., D]``, D a power of two, float32 or bfloat16, any strides.

    Returns:
        The shape and type of x.
    """
    check_float(x)
    size = check_power_of_two(x)
    y = x.float().contiguous()
    stride = 1
    while stride < size:
        pairs = y.view(*x.shape[:-1], size // (2 * stride), 2, stride)
        low, high = pairs.unbind(-2)  # [..., D / (2 * stride), stride]
        y = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    return (y * math.pow(size, -0.5)).to(x.dtype)


def check_power_of_two(x: Tensor) -> int:
    """The last axis' size; a ValueError unless it is a power of two."""
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of this kind has 2**n rows, not {size}")
    return size
