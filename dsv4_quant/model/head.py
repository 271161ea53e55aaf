"""From the streams to logits, and from token ids to embeddings.

Both tables are as large as a layer. Of the embedding only the rows that occur are read. The head is
read once, a few thousand rows at a time, and either it or all logits are then in memory, whichever
is less: logits are handed out whole, position after position.

t positions, d hidden_size, s hc_mult streams, v vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import rms_norm
from dsv4_quant.model.reading import stored_bytes
from dsv4_quant.model.streams import HyperHead
from dsv4_quant.model.weights import Reader, Rows, Weights

EMBED, HEAD = "embed.weight", "head.weight"

HEAD_ROWS = 8192
"""Rows of the head that are read and multiplied at a time."""

GROUP_BYTES = 1 << 27
"""Logits that are handed out together where all of them are not to be held."""


def embed(tokens: Tensor, reader: Reader) -> Tensor:
    """Token ids ``[t]`` -> ``[t, d]``."""
    ids, places = np.unique(tokens.numpy(), return_inverse=True)
    rows = [reader.read(Rows(EMBED, i, i + 1)).decode() for i in ids.tolist()]
    return torch.from_numpy(np.concatenate(rows)[places])


def head_input(h: Tensor, weights: Weights, config: ModelConfig, a: Arithmetic) -> Tensor:
    """Streams ``[t, s, d]`` -> what the head multiplies, ``[t, d]``.

    Args:
        weights: where ``norm`` and ``hc_head_*`` are: the top level, or ``mtp.0.``.
    """
    x = HyperHead(weights, config, a).read(h)
    return a.round(rms_norm(x, weights.vector("norm.weight"), config.rms_norm_eps))


def head_panels(config: ModelConfig) -> list[Rows]:
    """The pieces in which the head is read."""
    v = config.vocab_size
    return [Rows(HEAD, at, min(at + HEAD_ROWS, v)) for at in range(0, v, HEAD_ROWS)]


def logits(
    inputs: Sequence[Tensor], reader: Reader, config: ModelConfig, a: Arithmetic, *, at_once: bool
) -> Iterator[tuple[int, list[Tensor]]]:
    """``x @ head.T`` for several x ``[t, d]``, some positions after the others.

    Args:
        at_once: all positions together, in tensors that may be kept. Otherwise as many as are
            good for the memory, and what was handed out is overwritten later.

    Yields:
        the first position, and for every x its logits from there on, ``[t', v]`` float32.
    """
    count, v = len(inputs[0]), config.vocab_size
    row_bytes = 4 * v * len(inputs)
    if not at_once and count * row_bytes > stored_bytes(reader.source.specs[HEAD]):
        step = max(1, GROUP_BYTES // row_bytes)
    else:
        step = count
    panels: Iterable[tuple[Rows, Weight]] = ((at, reader.read(at)) for at in head_panels(config))
    if step < count:
        panels = list(panels)  # every group goes through all of them
    held = [torch.empty(step, v) for _ in inputs]
    for first in range(0, count, step):
        found = [out[: count - first] for out in held]
        for at, panel in panels:
            for x, out in zip(inputs, found, strict=True):
                out[:, at.start : at.stop] = a.linear_float32(x[first : first + step], panel)
        yield first, found
