"""The residual stream is s streams, and every sub-layer chooses how to read and write them (mHC).

t positions, d hidden_size, s hc_mult streams, m = (2 + s) * s mixing weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.kernels.ops import hc_split_sinkhorn
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import sigmoid
from dsv4_quant.model.linear import dot_rows
from dsv4_quant.model.weights import Weights


def expand(embedded: Tensor, streams: int) -> Tensor:
    """The start: every stream is a copy of the embedding, ``[t, d]`` -> ``[t, s, d]``."""
    return embedded[:, None].expand(-1, streams, -1).contiguous()


class HyperConnection:
    """One sub-layer's ends: streams to input, and output back to streams."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, a: Arithmetic) -> None:
        """name: ``hc_attn`` or ``hc_ffn``."""
        self._a, self._config = a, config
        self._fn = weights.matrix(f"{name}_fn")  # [m, s * d]
        self._base = weights.vector(f"{name}_base")  # [m]
        self._scale = weights.vector(f"{name}_scale")  # [3]

    def read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams ``[t, s, d]`` -> the input ``[t, d]``, post ``[t, s]`` and comb ``[t, s, s]``."""
        c = self._config
        mixes = _mixes(h, self._fn, c, self._a)  # [t, m]
        pre, post, comb = hc_split_sinkhorn(
            mixes, self._scale, self._base, c.hc_mult, c.hc_sinkhorn_iters, c.hc_eps,
            backend="torch",
        )  # fmt: skip
        return self._a.round(_weighted_sum(pre, h)), post, comb

    def write(self, h: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """``h'[j] = post[j] * x + sum_i comb[i, j] * h[i]``: ``[t, s, d]``."""
        streams = [
            post[:, j, None] * x + _weighted_sum(comb[:, :, j], h) for j in range(h.shape[1])
        ]
        return self._a.round(torch.stack(streams, 1))


class HyperHead:
    """The end of the model: streams to one vector."""

    def __init__(self, weights: Weights, config: ModelConfig, a: Arithmetic) -> None:
        self._a, self._config = a, config
        self._fn = weights.matrix("hc_head_fn")  # [s, s * d]
        self._base = weights.vector("hc_head_base")  # [s]
        self._scale = weights.vector("hc_head_scale")  # [1]

    def read(self, h: Tensor) -> Tensor:
        """``[t, s, d]`` -> ``[t, d]``."""
        mixes = _mixes(h, self._fn, self._config, self._a)  # [t, s]
        pre = sigmoid(mixes * self._scale + self._base) + self._config.hc_eps
        return self._a.round(_weighted_sum(pre, h))


def _mixes(h: Tensor, fn: Weight, config: ModelConfig, a: Arithmetic) -> Tensor:
    """``(f @ fn.T) * rsqrt(mean(f * f) + eps)`` with f all streams in a row: ``[t, m]``."""
    f = h.flatten(1)  # [t, s * d]
    mean = dot_rows(f, f) / f.shape[1]  # [t]
    return a.linear_float32(f, fn) * (mean + config.rms_norm_eps).rsqrt()[:, None]


def _weighted_sum(by: Tensor, h: Tensor) -> Tensor:
    """``sum_i by[i] * h[i]``, first stream first: ``[t, s]`` and ``[t, s, d]`` -> ``[t, d]``."""
    total = by[:, 0, None] * h[:, 0]
    for i in range(1, h.shape[1]):
        total += by[:, i, None] * h[:, i]
    return total
