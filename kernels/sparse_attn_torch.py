"""sparse_attn: attention of every head to a gathered list of keys, with a sink.

One shared key-value head: key and value are the same vector. Which entries a position sees
(window, compressed entries, the indexer's choice) is decided before; here they are a list.
Definition. Its two products are batched matrix products, one matrix per position, and a BLAS may
choose its order of summation by the number of threads; the test at the published head size sees
equal bits for 1 and 2 threads, but nobody promises them. Everything else is bit-stable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.kernels.operands_torch import check_float

POSITIONS = 16
"""Positions whose keys are gathered at a time: bounds memory, and fixes the split of the work."""


def sparse_attn(
    q: Tensor, kv: Tensor, attn_sink: Tensor, indices: Tensor, softmax_scale: float
) -> Tensor:
    """``softmax([q . k * softmax_scale, attn_sink])`` without its last column, times ``k``.

    Scores, powers and sums in float32. The powers ``exp(score - max)`` are rounded to kv's type
    when they meet the values (bfloat16 in the ``deployed`` arithmetic); their sum is not.
    A position without any key gives 0. An entry listed twice counts twice. NaN and infinities in
    q, in the sink or in a listed key reach the heads and positions that use them, and no others.

    Args:
        q: ``[B, S, H, D]``, float32 or bfloat16.
        kv: ``[B, N, D]`` of q's type.
        attn_sink: ``[H]`` float32: a logit that takes part in the denominator only.
        indices: ``[B, S, L]`` int32 or int64: rows of kv, with -1 for "no key", anywhere.
        softmax_scale: usually ``D**-0.5``.

    Returns:
        ``[B, S, H, D]`` of q's type.

    Raises:
        IndexError: an index outside -1 ... N - 1. Only this definition looks: for the twin it
            would cost a wait for the device, so there such an entry counts as -1.
    """
    check_attention(q, kv, attn_sink, indices)
    if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < kv.shape[1]:
        raise IndexError(f"indices must lie between -1 and {kv.shape[1] - 1}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for batch in range(q.shape[0]):
        for start in range(0, q.shape[1], POSITIONS):
            here = (batch, slice(start, start + POSITIONS))
            out[here] = _attend(q[here], kv[batch], attn_sink, indices[here], softmax_scale)
    return out


def _attend(q: Tensor, kv: Tensor, sink: Tensor, indices: Tensor, softmax_scale: float) -> Tensor:
    """q ``[S, H, D]``, kv ``[N, D]``, indices ``[S, L]`` -> ``[S, H, D]`` float32."""
    absent = indices < 0  # [S, L]
    rows = kv.float().new_zeros(*indices.shape, kv.shape[-1])  # [S, L, D]
    rows[~absent] = kv[indices[~absent].long()].float()
    scores = q.float() @ rows.mT * softmax_scale  # [S, H, L]
    scores = scores.masked_fill(absent[:, None], -torch.inf)
    column = sink[:, None].expand(*scores.shape[:2], 1)  # [S, H, 1]
    logits = torch.cat((scores, column), -1)  # [S, H, L + 1]
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = powers[..., :-1].to(kv.dtype).float()
    return weights @ rows / powers.sum(-1, keepdim=True)


def check_attention(q: Tensor, kv: Tensor, attn_sink: Tensor, indices: Tensor) -> None:
    """ValueError or TypeError for operands that do not fit each other."""
    check_float(q)
    if kv.dtype != q.dtype or attn_sink.dtype != torch.float32:
        raise TypeError(f"kv is {q.dtype} like q, the sink float32: {kv.dtype}, {attn_sink.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices are int32 or int64, not {indices.dtype}")
    fits = q.dim() == 4 and kv.shape == (q.shape[0], kv.shape[1], q.shape[3])
    if not fits or attn_sink.shape != q.shape[2:3] or indices.shape[:-1] != q.shape[:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)}, sink {tuple(attn_sink.shape)} and indices "
            f"{tuple(indices.shape)} do not fit each other"
        )
