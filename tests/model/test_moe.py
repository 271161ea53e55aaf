"""Routing and experts, against the formula written out for one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dsv4_quant.errors import UnreadableError
from dsv4_quant.formats.blocks import F32, I64, Tensor
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.linear import Workers
from dsv4_quant.model.moe import Gate, Routing, routed_experts, shared_expert
from dsv4_quant.model.weights import Reader, Weights
from tests.model.random_model import MemorySource, random_source

LAYER = 2
"""Of the BASE config, layer 0 is hash-routed and the others are scored."""


@pytest.fixture
def a() -> Iterator[Arithmetic]:
    with Workers(1) as workers:
        yield Arithmetic(deployed=False, bfloat16=False, products=workers)


def inputs(source: MemorySource, count: int = 9) -> torch.Tensor:
    return torch.randn(count, source.config.hidden_size, generator=torch.Generator().manual_seed(7))


def test_softmax_scores_are_not_divided_by_their_sum(a: Arithmetic) -> None:
    source = random_source(scoring_func="softmax")
    x = inputs(source)
    with Reader(source) as reader:
        weights = Weights(reader, f"layers.{LAYER}.ffn.gate.")
        routing = Gate(weights, LAYER, source.config, a)(x, torch.zeros(9, dtype=torch.long))
        scores = (x @ weights.vector("weight").T).softmax(-1)
        order = (scores + weights.vector("bias")).topk(2).indices
    torch.testing.assert_close(routing.experts, order)
    torch.testing.assert_close(routing.weights, scores.gather(-1, order) * 1.5)


def test_the_bias_chooses_but_does_not_weigh(a: Arithmetic) -> None:
    source = random_source()
    name = f"layers.{LAYER}.ffn.gate.bias"
    source.tensors[name] = Tensor(F32, (6,), np.array([0, 0, 0, 9, 0, 9], np.float32))
    x = inputs(source)
    with Reader(source) as reader:
        weights = Weights(reader, f"layers.{LAYER}.ffn.gate.")
        routing = Gate(weights, LAYER, source.config, a)(x, torch.zeros(9, dtype=torch.long))
        logits = x @ weights.vector("weight").T
    assert {frozenset(row) for row in routing.experts.tolist()} == {frozenset((3, 5))}
    scores = torch.nn.functional.softplus(logits).sqrt().gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, 1.5 * scores / scores.sum(-1, keepdim=True))


def test_of_equal_scores_the_lower_ids_win(a: Arithmetic) -> None:
    source = random_source()
    with Reader(source) as reader:
        gate = Gate(Weights(reader, f"layers.{LAYER}.ffn.gate."), LAYER, source.config, a)
        gate._bias = torch.zeros(6)
        routing = gate(torch.zeros(3, 64), torch.zeros(3, dtype=torch.long))
    assert routing.experts.tolist() == [[0, 1]] * 3


def test_experts_one_token_at_a_time(a: Arithmetic) -> None:
    """Also a table that names an expert twice: its output counts twice."""
    source = random_source(swiglu_limit=0.5)
    x = inputs(source, 4)
    routing = Routing(
        torch.tensor([[0, 5], [5, 0], [2, 2], [3, 5]]), torch.rand(4, 2, generator=None) + 0.1
    )
    assert routing.hit() == [0, 2, 3, 5]
    with Reader(source) as reader:
        weights = Weights(reader, f"layers.{LAYER}.ffn.experts.")
        found = routed_experts(x, routing, weights, source.config, a)
        read = {name.split(".")[4] for name in source.reads}
        assert read == {"0", "2", "3", "5"} and len(source.reads) == 12, "each once, no other"
        expected = torch.zeros(4, 64)
        for token in range(4):
            for slot in range(2):
                expert = int(routing.experts[token, slot])
                w1, w2, w3 = (weights.vector(f"{expert}.{w}.weight") for w in ("w1", "w2", "w3"))
                gate = (w1 @ x[token]).clamp(max=0.5)
                up = (w3 @ x[token]).clamp(-0.5, 0.5)
                hidden = torch.nn.functional.silu(gate) * up * routing.weights[token, slot]
                expected[token] += w2 @ hidden
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_shared_expert_is_not_clamped(a: Arithmetic) -> None:
    source = random_source(swiglu_limit=0.01, n_shared_experts=2)
    x = 5 * inputs(source)
    with Reader(source) as reader:
        weights = Weights(reader, f"layers.{LAYER}.ffn.shared_experts.")
        w1, w2, w3 = (weights.vector(f"{w}.weight") for w in ("w1", "w2", "w3"))
        found = shared_expert(x, weights, a)
    assert w1.shape == (64, 64), "two shared experts are one of twice the width"
    expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", [-1, 6])
def test_a_table_that_names_no_expert(expert: int, a: Arithmetic) -> None:
    source = random_source()
    name = "layers.0.ffn.gate.tid2eid"
    table = source.tensors[name].codes.copy()
    table[-1, -1] = expert
    source.tensors[name] = Tensor(I64, table.shape, table)
    with Reader(source) as reader, pytest.raises(UnreadableError, match="tid2eid"):
        Gate(Weights(reader, "layers.0.ffn.gate."), 0, source.config, a)
