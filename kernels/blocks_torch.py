"""Matrices in blocks: cutting them up, putting them together, and adding up a block.

R x C matrix, blocks of b x c, h x w of them; a block at a ragged edge is a whole one, filled up.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_blocks(x: Tensor, block: tuple[int, int], fill: float = 0) -> Tensor:
    """``[..., R, C]`` -> ``[..., h, w, b * c]``, each block row-major; fill stands beyond edges."""
    (b, c), (rows, cols) = block, x.shape[-2:]
    h, w = -(-rows // b), -(-cols // c)
    padded = F.pad(x, (0, w * c - cols, 0, h * b - rows), value=fill)
    return padded.reshape(*x.shape[:-2], h, b, w, c).transpose(-3, -2).flatten(-2)


def join_blocks(blocks: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`split_blocks`: ``[..., h, w, b * c]`` -> ``[..., R, C]``."""
    h, w = blocks.shape[-3:-1]
    grid = blocks.reshape(*blocks.shape[:-1], *block).transpose(-3, -2)  # [..., h, b, w, c]
    whole = grid.reshape(*blocks.shape[:-3], h * block[0], w * block[1])
    return whole[..., : shape[0], : shape[1]].contiguous()


def spread_blocks(scales: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """One scale per value: ``[..., h, w]`` -> ``[..., R, C]``."""
    rows = scales.repeat_interleave(block[0], -2)[..., : shape[0], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[1]]


def fold_sum(x: Tensor) -> Tensor:
    """Sum of the last axis by halves, ``x[0 : n/2] + x[n/2 : n]`` until one is left: ``[...]``.

    n is the next power of two; zeros fill it up. Every implementation can add in this order.
    """
    n = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = F.pad(x, (0, n - x.shape[-1]))
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x.squeeze(-1)
