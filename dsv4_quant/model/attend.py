"""The attention itself: softmax over a window of keys, compressed entries and a sink.

Written so that a position's bits do not depend on which others are computed with it: what a
position does not see weighs 0, which changes no sum, and a key's lane in a sum (``dot``) follows
from its position, because the keys of a product begin at a multiple of 16.

t positions, n heads, h head_dim, u keys of the window, e compressed entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.dot import LANES
from dsv4_quant.model.functions import sum_last
from dsv4_quant.model.linear import as_weight

POSITIONS = 32
"""Positions that are computed together: they share most of their windows."""


def window_start(position: int, window: int) -> int:
    """Where the keys begin that a position and its successors need; a multiple of LANES."""
    return max(position - window + 1, 0) // LANES * LANES


def attend(
    q: Tensor,
    keys: Tensor,
    entries: Tensor,
    seen: Tensor,
    sink: Tensor,
    *,
    start: int,
    window: int,
    a: Arithmetic,
) -> Tensor:
    """``sum(p_i k_i)`` with ``p = softmax([q . k * h**-0.5, sink])``, for every head.

    Args:
        q: ``[t, n, h]``.
        keys: ``[u, h]`` of the positions from ``window_start(start, window)`` to the last of q.
        entries: ``[e, h]``, compressed.
        seen: bool ``[t, e]``: which of them a position sees.
        sink: ``[n]``, a logit without a value.
        start: position of the first query.
        window: keys that a position sees, its own included.

    Returns:
        ``[t, n, h]`` float32.
    """
    out = torch.empty_like(q)
    first = window_start(start, window)
    for at in range(0, len(q), POSITIONS):
        some = slice(at, min(at + POSITIONS, len(q)))
        low, high = start + some.start, start + some.stop  # positions of these queries
        from_ = window_start(low, window)
        age = torch.arange(low, high)[:, None] - torch.arange(from_, high)  # [t, u]
        near = keys[from_ - first : high - first]  # [u, h]
        near_seen = (age >= 0) & (age < window)
        out[some] = _softmax_sum(q[some], near, near_seen, entries, seen[some], sink, a)
    return out


def _softmax_sum(
    q: Tensor, near: Tensor, near_seen: Tensor, far: Tensor, far_seen: Tensor, sink: Tensor,
    a: Arithmetic,
) -> Tensor:  # fmt: skip
    parts = [(near, near_seen)] + ([(far, far_seen)] if len(far) else [])
    scale = q.shape[-1] ** -0.5
    scores = [
        (a.linear_float32(q, as_weight(keys)) * scale).masked_fill(~seen[:, None], -torch.inf)
        for keys, seen in parts
    ]  # [t, n, u] and [t, n, e]
    top = torch.stack([part.amax(-1) for part in scores]).amax(0)  # [t, n]
    total = (sink - top).exp()  # [t, n]
    values = torch.zeros_like(q)  # [t, n, h]
    for (keys, _), part in zip(parts, scores, strict=True):
        powers = (part - top[..., None]).exp()
        total = total + sum_last(powers)
        by_channel = as_weight(keys.T)  # [h, u] or [h, e]
        values = values + a.linear_float32(a.round(powers), by_channel, block=None)
    return values / total[..., None]
