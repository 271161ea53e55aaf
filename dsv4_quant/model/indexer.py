"""The indexer: which compressed entries a position attends to, where there are too many (CSA).

A small attention of its own scores every entry; the best ``index_topk`` are kept. It has its own
compressor over the same windows, so its key i stands for the same tokens as entry i.

t positions, d hidden_size, q q_lora_rank, i index_n_heads, j index_head_dim, n entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.kernels.ops import hadamard
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.compressor import Compressor
from dsv4_quant.model.functions import sum_halves
from dsv4_quant.model.linear import as_weight
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.weights import Weights

POSITIONS = 64
"""Positions whose scores are held at a time."""


class Indexer:
    """One layer's indexer. Args: weights: the tensors under ``indexer.``."""

    def __init__(
        self, weights: Weights, ratio: int, config: ModelConfig, a: Arithmetic, rope: Rope
    ) -> None:
        self._a, self._rope, self._config = a, rope, config
        self.compressor = Compressor(
            weights.under("compressor."), ratio, config, a, rope, self._rotate
        )
        self._wq_b = weights.matrix("wq_b.weight")  # [i * j, q]
        self._weights_proj = weights.matrix("weights_proj.weight")  # [i, d]

    def ask(self, x: Tensor, qr: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[t, i, j]`` and the heads' weights ``[t, i]``."""
        c = self._config
        q = self._a.linear(qr, self._wq_b).view(len(x), c.index_n_heads, -1)  # [t, i, j]
        q = self._rotate(self._a.round(self._rope(q, positions)))
        scale = c.index_head_dim**-0.5 * c.index_n_heads**-0.5
        return q, self._a.round(self._a.linear(x, self._weights_proj) * scale)

    def choose(self, q: Tensor, by_head: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """The entries that each position attends to.

        Args:
            q, by_head: what ``ask`` returned.
            keys: ``[n, j]``, the entries of the indexer's own compressor.
            allowed: ``[t]``: position p may see entries 0 ... allowed[p] - 1.

        Returns:
            bool ``[t, n]``: of the allowed entries the ``index_topk`` of the highest score, all if
            there are no more. Of equal scores the earlier entry goes first.
        """
        seen = torch.arange(len(keys)) < allowed[:, None]  # [t, n]
        top = self._config.index_topk
        if len(keys) <= top:
            return seen
        for start in range(0, len(q), POSITIONS):
            some = slice(start, start + POSITIONS)
            scores = self._scores(q[some], by_head[some], keys)  # [t, n]
            scores = scores.masked_fill(~seen[some], -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top]
            seen[some] &= torch.zeros_like(seen[some]).scatter(-1, best, True)
        return seen

    def _scores(self, q: Tensor, by_head: Tensor, keys: Tensor) -> Tensor:
        """``score[p, i] = sum_h relu(q_h . k_i) * w_h``: ``[t, n]``."""
        products = self._a.round(self._a.linear_float32(q, as_weight(keys)))  # [t, i, n]
        return self._a.round(sum_halves(products.relu() * by_head[..., None], 1))

    def _rotate(self, x: Tensor) -> Tensor:
        """The Hadamard rotation of queries and keys, and how they are kept."""
        return self._a.store_index(self._a.round(hadamard(x, backend="torch")))
