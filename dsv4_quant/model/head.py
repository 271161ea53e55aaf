"""From the streams to logits, and from token ids to embeddings.

Both tables are as large as a layer, so embeddings are read row by row, and the head a few thousand
rows at a time.

t positions, d hidden_size, s hc_mult streams, v vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import rms_norm
from dsv4_quant.model.streams import HyperHead
from dsv4_quant.model.weights import Reader, Weights

HEAD_ROWS = 8192
"""Rows of the head that are in memory at a time."""


def embed(tokens: Tensor, reader: Reader) -> Tensor:
    """Token ids ``[t]`` -> ``[t, d]``."""
    ids: list[int] = tokens.tolist()
    read = reader.source.read_rows
    rows = {i: torch.from_numpy(read("embed.weight", i, i + 1).decode())[0] for i in set(ids)}
    return torch.stack([rows[i] for i in ids])


def logits(h: Tensor, weights: Weights, config: ModelConfig, a: Arithmetic) -> Tensor:
    """Streams ``[t, s, d]`` -> ``[t, v]`` float32.

    Args:
        weights: where ``norm`` and ``hc_head_*`` are: the top level, or ``mtp.0.``. The matrix is
            the model's ``head.weight`` in both cases.
    """
    x = HyperHead(weights, config, a).read(h)  # [t, d]
    x = a.round(rms_norm(x, weights.vector("norm.weight"), config.rms_norm_eps))
    out = torch.empty(len(x), config.vocab_size)
    for start in range(0, config.vocab_size, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, config.vocab_size)
        rows = weights.reader.source.read_rows("head.weight", start, stop)
        out[:, start:stop] = a.linear_float32(x, rows)
    return out
