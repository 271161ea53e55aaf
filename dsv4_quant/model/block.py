"""One layer: attention, then experts, each between its own reads and writes of the streams.

t positions of all prompts, d hidden_size, s hc_mult streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.attention import Attention
from dsv4_quant.model.batch import CHUNK, Batch
from dsv4_quant.model.functions import rms_norm
from dsv4_quant.model.moe import Gate, Routing, routed_experts, shared_expert
from dsv4_quant.model.observer import Observer, Part
from dsv4_quant.model.rope import Rope
from dsv4_quant.model.streams import HyperConnection
from dsv4_quant.model.weights import Wanted, Weights


@dataclass(frozen=True)
class Setting:
    """What all layers of one forward pass share."""

    config: ModelConfig
    batch: Batch
    arithmetic: Arithmetic
    rope: Rope
    """For layers without compression."""
    compressed_rope: Rope
    observer: Observer


def run_block(
    h: Tensor, layer: int, weights: Weights, then: list[Wanted], set_: Setting
) -> Routing:
    """Takes the streams ``[t, s, d]`` of all prompts through one layer, in place.

    Args:
        weights: the tensors under ``layers.N.`` or ``mtp.0.``.
        then: tensors to read ahead while the experts are computed.

    Returns:
        which experts the layer's tokens went to.
    """
    _attention(h, layer, weights, set_)
    _watch(h, layer, "attn", set_)
    routing = _experts(h, layer, weights, then, set_)
    _watch(h, layer, "ffn", set_)
    return routing


def _attention(h: Tensor, layer: int, weights: Weights, set_: Setting) -> None:
    config, a = set_.config, set_.arithmetic
    ratio = config.compress_ratios[layer]
    rope = set_.compressed_rope if ratio else set_.rope
    attention = Attention(weights.under("attn."), ratio, config, a, rope)
    norm = weights.vector("attn_norm.weight")  # [d]
    connection = HyperConnection(weights, "hc_attn", config, a)
    states = [attention.start() for _ in set_.batch.lengths]
    for chunk in set_.batch.chunks():
        before = h[chunk.rows]  # [t', s, d]
        x, post, comb = connection.read(before)
        x = a.round(rms_norm(x, norm, config.rms_norm_eps))  # [t', d]
        h[chunk.rows] = connection.write(before, attention(x, chunk, states), post, comb)


def _experts(h: Tensor, layer: int, weights: Weights, then: list[Wanted], set_: Setting) -> Routing:
    config, a = set_.config, set_.arithmetic
    gate = Gate(weights.under("ffn.gate."), layer, config, a)
    norm = weights.vector("ffn_norm.weight")  # [d]
    connection = HyperConnection(weights, "hc_ffn", config, a)
    x = torch.empty(len(h), h.shape[-1])  # [t, d]
    mixes = []
    for rows in _groups(len(h)):
        read, post, comb = connection.read(h[rows])
        x[rows] = a.round(rms_norm(read, norm, config.rms_norm_eps))
        mixes.append((post, comb))
    routing = gate(x, set_.batch.tokens)
    for prompt in range(len(set_.batch.lengths)):
        set_.observer.routed(layer, prompt, routing.experts[set_.batch.rows(prompt)])

    experts = weights.under("ffn.experts.")
    wanted = [f"{experts.prefix}{e}.{w}.weight" for e in routing.hit() for w in ("w1", "w2", "w3")]
    weights.reader.announce([*wanted, *then])
    shared = shared_expert(x, weights.under("ffn.shared_experts."), a)
    watch = partial(set_.observer.expert_inputs, layer)
    made = a.round(routed_experts(x, routing, experts, config, a, watch) + shared)  # [t, d]
    for rows, (post, comb) in zip(_groups(len(h)), mixes, strict=True):
        h[rows] = connection.write(h[rows], made[rows], post, comb)
    return routing


def _groups(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK)


def _watch(h: Tensor, layer: int, part: Part, set_: Setting) -> None:
    for prompt in range(len(set_.batch.lengths)):
        set_.observer.streams(layer, part, prompt, h[set_.batch.rows(prompt)])
