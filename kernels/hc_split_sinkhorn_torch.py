"""hc_split_sinkhorn: the mixing weights of the hyper-connections (mHC).

From one row of ``(2 + hc) * hc`` numbers per token: how much of every stream enters the sub-layer
(pre), how much of its result every stream receives (post), and how the streams mix (comb), made
nearly doubly stochastic by Sinkhorn's alternating normalisation.
Definition; bit-stable: sums over streams are added in the order of the streams, and ``torch.exp``
treats every element alike, which ``torch.sigmoid`` does not (its vector tail rounds differently,
so that its bits depend on the number of threads).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def hc_split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, hc: int = 4, iters: int = 20, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Split and normalise; all in float32.

    ``pre = sigmoid(m * scale[0] + base) + eps``; ``post = 2 * sigmoid(m * scale[1] + base)``;
    ``comb = softmax(m * scale[2] + base, last axis) + eps``, then ``comb /= comb.sum(-2) + eps``,
    then ``iters - 1`` times ``comb /= comb.sum(-1) + eps`` and ``comb /= comb.sum(-2) + eps``.

    Args:
        mixes: ``[..., (2 + hc) * hc]`` float32: pre hc, post hc, comb hc * hc row-major.
        scale: ``[3]`` float32.
        base: ``[(2 + hc) * hc]`` float32.
        hc: streams (``hc_mult``).
        iters: normalisations over columns (``hc_sinkhorn_iters``), at least 1.
        eps: ``hc_eps``.

    Returns:
        pre ``[..., hc]``, post ``[..., hc]``, comb ``[..., hc, hc]``, float32.
    """
    check_mixes(mixes, scale, base, hc, iters)
    first, second, rest = slice(hc), slice(hc, 2 * hc), slice(2 * hc, None)
    pre = _sigmoid(mixes[..., first] * scale[0] + base[first]) + eps
    post = 2 * _sigmoid(mixes[..., second] * scale[1] + base[second])

    logits = mixes[..., rest] * scale[2] + base[rest]
    logits = logits.view(*mixes.shape[:-1], hc, hc)
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    comb = powers / _sum(powers, -1) + eps
    comb = comb / (_sum(comb, -2) + eps)
    for _ in range(iters - 1):
        comb = comb / (_sum(comb, -1) + eps)
        comb = comb / (_sum(comb, -2) + eps)
    return pre, post, comb


def check_mixes(mixes: Tensor, scale: Tensor, base: Tensor, hc: int, iters: int) -> None:
    """ValueError or TypeError for operands that do not fit each other."""
    if not mixes.dtype == scale.dtype == base.dtype == torch.float32:
        raise TypeError("mixes, scale and base are float32")
    if hc < 1 or iters < 1:
        raise ValueError(f"needs at least one stream and one iteration, not {hc} and {iters}")
    width = (2 + hc) * hc
    if mixes.shape[-1] != width or base.shape != (width,) or scale.shape != (3,):
        raise ValueError(
            f"{hc} streams take mixes [..., {width}], base [{width}] and scale [3], not "
            f"{tuple(mixes.shape)}, {tuple(base.shape)} and {tuple(scale.shape)}"
        )


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _sum(x: Tensor, axis: int) -> Tensor:
    """Sum over one short axis, first to last, the axis kept."""
    return reduce(torch.add, x.unbind(axis)).unsqueeze(axis)
