"""Compression: r tokens become one entry that stands for them in attention.

Every token offers a candidate c and, per channel, a logit z for how much of it the entry takes.
HCA (any r but 4): an entry pools the r tokens of its window, one series.
CSA (r = 4): two overlapping series. Each token offers two candidates, A to the entry of the next
window and B to that of its own, so an entry pools 2r of them; window 0 has no A to pool.

t positions, d hidden_size, r compress ratio, h width of an entry (head_dim, or index_head_dim in
the indexer), c series (2 for r = 4, else 1), n windows that end in these positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.catalogue import CSA_RATIO
from dsv4_quant.config import ModelConfig
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import rms_norm, softmax, sum_halves
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.weights import Weights


@dataclass
class CompressorState:
    """What one prompt leaves behind: finished entries, and the window that is not finished."""

    entries: Tensor
    """``[windows so far, h]``"""
    candidates: Tensor
    """``[waiting tokens, c * h]``; with two series the last finished window is kept as well."""
    logits: Tensor
    """The same tokens' ``[waiting tokens, c * h]``."""


class Compressor:
    """One compressor's weights and arithmetic; states belong to the prompts.

    Args:
        weights: the tensors under ``compressor.``.
        store: how a finished entry is rounded before it is kept.
    """

    def __init__(
        self,
        weights: Weights,
        ratio: int,
        config: ModelConfig,
        a: Arithmetic,
        rope: Rope,
        store: Callable[[Tensor], Tensor],
    ) -> None:
        self._a, self._rope, self._store, self._ratio = a, rope, store, ratio
        self._overlaps = ratio == CSA_RATIO
        self._eps = config.rms_norm_eps
        self._wkv = weights.matrix("wkv.weight")  # [c * h, d]
        self._wgate = weights.matrix("wgate.weight")  # [c * h, d]
        self._ape = weights.vector("ape")  # [r, c * h]
        self._norm = weights.vector("norm.weight")  # [h]

    def start(self) -> CompressorState:
        """The state before the first token."""
        width, h = self._ape.shape[1], len(self._norm)
        before = self._ratio if self._overlaps else 0  # the window before the first: weight 0
        return CompressorState(
            entries=torch.zeros(0, h),
            candidates=torch.zeros(before, width),
            logits=torch.full((before, width), -torch.inf),
        )

    def offer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and logits of tokens, ``[t, d]`` -> twice ``[t, c * h]``, float32."""
        return self._a.linear_float32(x, self._wkv), self._a.linear_float32(x, self._wgate)

    def extend(self, state: CompressorState, candidates: Tensor, logits: Tensor) -> None:
        """Takes the next tokens of a prompt; every window that they finish becomes an entry."""
        r, before = self._ratio, self._ratio if self._overlaps else 0
        candidates = torch.cat((state.candidates, candidates))
        logits = torch.cat((state.logits, logits))
        n = (len(candidates) - before) // r
        if n:
            used = before + n * r
            pooled = self._pool(candidates[:used], logits[:used])  # [n, h]
            first = len(state.entries)
            positions = torch.arange(first, first + n) * r  # of each window's first token
            entries = self._a.round(rms_norm(self._a.round(pooled), self._norm, self._eps))
            entries = self._store(self._a.round(self._rope(entries, positions)))
            state.entries = torch.cat((state.entries, entries))
        state.candidates, state.logits = candidates[n * r :], logits[n * r :]

    def _pool(self, candidates: Tensor, logits: Tensor) -> Tensor:
        """``sum over slots of softmax(z) * c``, per channel: ``[n, h]``."""
        shape = (-1, *self._ape.shape)
        c, z = candidates.view(shape), logits.view(shape) + self._ape  # [n, r, c * h]
        if self._overlaps:
            c, z = _overlap(c), _overlap(z)  # [n, 2r, h]
        return sum_halves(softmax(z, 1) * c, 1)


def _overlap(windows: Tensor) -> Tensor:
    """``[1 + n, r, 2h]`` -> ``[n, 2r, h]``: A of the window before, then B of the window."""
    a, b = windows.chunk(2, -1)
    return torch.cat((a[:-1], b[1:]), 1)
