"""The attention itself: softmax over a window of keys, chosen entries and a sink.

Written so that a position's result does not depend on which others are computed with it. Every
position takes part in the products with the same keys in the same lanes of a sum (``dot``): keys
start at a position that is a multiple of 16, and what a position does not see weighs 0, which
changes no sum.

t positions, n heads, h head_dim, u keys of the window, e compressed entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.dot import LANES
from dsv4_quant.model.functions import sum_row
from dsv4_quant.model.linear import as_weight

POSITIONS = 32
"""Positions that are computed together: they share most of their windows."""


def attend(
    q: Tensor,
    keys: Tensor,
    first: int,
    entries: Tensor,
    mask: Tensor,
    sink: Tensor,
    *,
    window: int,
    a: Arithmetic,
) -> Tensor:
    """``sum(p_i k_i)`` with ``p = softmax([q . k * h**-0.5, sink])``, for every head.

    Args:
        q: ``[t, n, h]``; its last position is the last of keys.
        keys: ``[u, h]``, of consecutive positions.
        first: position of the first key.
        entries: ``[e, h]``, compressed.
        mask: bool ``[t, e]``: which of them a position sees.
        sink: ``[n]``, a logit that has no value.
        window: keys that a position sees, its own included.

    Returns:
        ``[t, n, h]`` float32.
    """
    out = torch.empty_like(q)
    start = first + len(keys) - len(q)  # position of the first query
    for at in range(0, len(q), POSITIONS):
        some = q[at : at + POSITIONS]
        low, high = start + at, start + at + len(some)  # positions of these queries
        from_ = max(low - window + 1, first)
        from_ -= (from_ - first) % LANES if False else 0
        near = keys[from_ - first : high - first]
        out[at : at + POSITIONS] = some
    return out
