"""Functions of a row whose bits depend on that row alone.

``torch.sigmoid``, ``silu`` and ``softplus`` round the last few values of an array differently from
the others, so a value's bits depend on its place in a batch; ``exp``, ``log1p``, ``sqrt`` and plain
arithmetic do not (measured, torch 2.13 on a CPU). Sums are taken in an order that is written down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.model.linear import dot_rows


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    return 1 / (1 + (-x).exp())


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, written so that nothing overflows."""
    return x.clamp_min(0) + (-x.abs()).exp().log1p()


def softmax(x: Tensor, axis: int) -> Tensor:
    """``exp(x) / sum(exp(x))`` over one axis; at least one x of every sum must be finite."""
    powers = (x - x.amax(axis, keepdim=True)).exp()
    return powers / sum_halves(powers, axis).unsqueeze(axis)


def sum_halves(x: Tensor, axis: int) -> Tensor:
    """Sum over an axis: its second half is added to the first until one value is left.

    With an odd length the middle value waits. The order depends on the length alone.
    """
    while (length := x.shape[axis]) > 1:
        half = length // 2
        first, second = x.narrow(axis, 0, half), x.narrow(axis, length - half, half)
        middle = x.narrow(axis, half, length % 2)
        x = torch.cat((first + second, middle), axis)
    return x.squeeze(axis)


def sum_last(x: Tensor) -> Tensor:
    """Sum over the last axis in the order of ``dot``; zeros at its end change nothing."""
    return dot_rows(x, torch.ones(x.shape[-1]))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x * x) + eps)``, times a weight where there is one: ``[..., d]``."""
    mean = dot_rows(x, x) / x.shape[-1]  # [...]
    scaled = x * (mean + eps).rsqrt()[..., None]
    return scaled if weight is None else scaled * weight
