"""ordered_gemm: a float32 product of matrices whose every sum has a written order.

So its bits depend on its operands alone, and not on the shapes, the tiles or the machine. A result
is the dot product of two rows of K values:

    cut into blocks (of 1024 values unless said otherwise; the last is filled with zeros to 16);
    in a block, lane l of 16 starts at 0 and takes the values l, l + 16, l + 32, ... in turn, each
    with one fused multiply-add; then the lanes are halved, lane l + lane l + 8, + 4, + 2, + 1;
    the blocks' sums are added in their order, starting from 0.

Every operation is IEEE float32, rounded to nearest. ``model.dot`` is the same on a processor.
Definition; bit-stable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4_quant.kernels.fma_torch import fma

LANES = 16

BLOCK = 1024
"""Values that are summed in lanes before the lanes are added up."""

HELD_LANES = 1 << 20
"""Sums under way that are held at a time; a row of results is never cut."""


def ordered_gemm(x: Tensor, w: Tensor, block: int | None = BLOCK) -> Tensor:
    """``x @ w.T`` in the order above.

    Args:
        x: ``[M, K]`` float32.
        w: ``[N, K]`` float32.
        block: a multiple of LANES; None: all of K is one block.

    Returns:
        ``[M, N]`` float32. The bits of a NaN are unspecified.
    """
    m, n, k = check_ordered(x, w, block)
    filled = [pad(part, (0, -k % LANES)) for part in (x, w)]
    some, step = max(1, HELD_LANES // (LANES * max(n, 1))), block or filled[0].shape[1]
    y = torch.zeros(m, n, device=x.device)
    if not y.numel() or not k:
        return y
    for row in range(0, m, some):
        rows = slice(row, row + some)
        for start in range(0, k, step):
            left, right = (part[:, start : start + step] for part in filled)
            y[rows] += _block_sums(left[rows], right)
    return y


def _block_sums(x: Tensor, w: Tensor) -> Tensor:
    """One block of ``x @ w.T``; K is a multiple of LANES."""
    lanes = torch.zeros(len(x), len(w), LANES, device=x.device)
    steps = (part.reshape(len(part), -1, LANES).unbind(1) for part in (x, w))
    for a, b in zip(*steps, strict=True):  # [M, LANES], [N, LANES]
        lanes = fma(a[:, None], b, lanes)  # [M, N, LANES]
    while (width := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def check_ordered(x: Tensor, w: Tensor, block: int | None) -> tuple[int, int, int]:
    """M, N and K. TypeError for another type than float32, ValueError for shapes that do not fit
    or a block that is none."""
    if (x.dtype, w.dtype) != (torch.float32, torch.float32):
        raise TypeError(f"expected float32 twice, got {x.dtype} and {w.dtype}")
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)} are no [M, K] and [N, K]")
    if block is not None and (block < 1 or block % LANES):
        raise ValueError(f"a block is a multiple of {LANES} values, not {block}")
    return x.shape[0], w.shape[0], x.shape[1]
