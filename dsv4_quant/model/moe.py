"""The mixture of experts: a gate picks k experts for every token, one shared expert sees them all.

In the first ``num_hash_layers`` layers the token's id picks the experts, by a table; the gate only
weighs them. In the others the k highest scores do, with a bias that balances the load and takes no
part in the weights.

t positions, d hidden_size, e n_routed_experts, k num_experts_per_tok, f moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UnreadableError
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import sigmoid, silu, softmax, softplus, sum_halves
from dsv4_quant.model.weights import Weights

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
    "sigmoid": sigmoid,
    "softmax": lambda logits: softmax(logits, -1),
}
"""By ``scoring_func``: ``[t, e]`` -> ``[t, e]``."""

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""``Observer.expert_inputs`` of one layer: expert, rows, given, hidden."""


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes to, and what each contributes."""

    experts: Tensor
    """``[t, k]`` int64"""
    weights: Tensor
    """``[t, k]`` float32"""

    def hit(self) -> list[int]:
        """Experts that any token goes to, ascending."""
        return sorted(set(self.experts.flatten().tolist()))


class Gate:
    """One layer's router. Args: weights: the tensors under ``ffn.gate.``."""

    def __init__(self, weights: Weights, layer: int, config: ModelConfig, a: Arithmetic) -> None:
        self._a, self._config = a, config
        self._weight = weights.matrix("weight")  # [e, d]
        is_hash = layer < min(config.num_hash_layers, config.num_hidden_layers)
        self._by_token = _expert_table(weights, config) if is_hash else None  # [vocab_size, k]
        self._bias = None if is_hash else weights.vector("bias")  # [e]

    def __call__(self, x: Tensor, tokens: Tensor) -> Routing:
        """x ``[t, d]`` and token ids ``[t]``."""
        c = self._config
        scores = SCORES[c.scoring_func](self._a.linear_float32(x, self._weight))  # [t, e]
        if self._by_token is not None:
            experts = self._by_token[tokens]  # [t, k]
        else:
            assert self._bias is not None
            order = (scores + self._bias).sort(dim=-1, descending=True, stable=True).indices
            experts = order[:, : c.num_experts_per_tok]  # of equal scores the lower id goes first
        weights = scores.gather(-1, experts)  # [t, k]
        if c.scoring_func != "softmax":
            weights = weights / sum_halves(weights, -1)[:, None]
        return Routing(experts, weights * c.routed_scaling_factor)


def _expert_table(weights: Weights, config: ModelConfig) -> Tensor:
    table = weights.table("tid2eid")
    if not 0 <= int(table.min()) <= int(table.max()) < config.n_routed_experts:
        raise UnreadableError(
            "A token is routed to an expert that does not exist", tensor=f"{weights.prefix}tid2eid"
        )
    return table


def routed_experts(
    x: Tensor,
    routing: Routing,
    weights: Weights,
    config: ModelConfig,
    a: Arithmetic,
    watch: Watch | None = None,
) -> Tensor:
    """Sum of what each token's experts make of it: ``[t, d]`` -> ``[t, d]`` float32.

    One expert is in memory at a time. A token's sum is taken in the order of the expert ids, so it
    does not depend on the other tokens.

    Args:
        weights: the tensors under ``ffn.experts.``.
        watch: is told what each expert's matrices are given.
    """
    out = torch.zeros_like(x)
    for expert in routing.hit():
        w1, w2, w3 = (weights.matrix(f"{expert}.{w}.weight") for w in ("w1", "w2", "w3"))
        slots, rows = routing.experts.T.eq(expert).nonzero(as_tuple=True)  # slot by slot
        given = x[rows]  # [t', d]
        gate = a.linear(given, w1).clamp_max(config.swiglu_limit)  # [t', f]
        up = a.linear(given, w3).clamp(-config.swiglu_limit, config.swiglu_limit)
        hidden = a.round(silu(gate) * up * routing.weights[rows, slots, None])
        made = a.linear(hidden, w2)  # [t', d]
        if watch is not None:
            watch(expert, rows, given, hidden)
        for slot in sorted(set(slots.tolist())):  # a table may name an expert twice for one token
            out[rows[slots == slot]] += made[slots == slot]
    return out


def shared_expert(x: Tensor, weights: Weights, a: Arithmetic) -> Tensor:
    """``w2(silu(w1 x) * w3 x)``, neither clamped nor weighted: ``[t, d]`` -> ``[t, d]``."""
    gate = a.linear(x, weights.matrix("w1.weight"))  # [t, f]
    up = a.linear(x, weights.matrix("w3.weight"))
    return a.linear(a.round(silu(gate) * up), weights.matrix("w2.weight"))
