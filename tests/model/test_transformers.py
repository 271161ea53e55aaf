"""The exact arithmetic is what transformers computes, at every position, within 1e-4.

An implementation that shares no line with ours. Near-ties of the indexer or the gate would make
two right answers differ; with 16 index heads a score is never exactly 0, and the seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.formats.blocks import F32, Tensor
from dsv4_quant.model import forward
from dsv4_quant.model.forward import one_torch_thread
from tests.folders import golden
from tests.model.random_model import (
    MemorySource,
    decoded,
    random_source,
    tokens,
    transformers_model,
)

TOLERANCE = 1e-4
"""The contract's; logits have a standard deviation of 1. Measured: below 5e-6."""

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 300]

CONFIGS: dict[str, dict[str, Any]] = {
    "as-published": {"index_n_heads": 16},
    "no-yarn, three groups": {
        "rope_scaling": None,
        "num_attention_heads": 6,
        "o_groups": 3,
        "head_dim": 48,
        "qk_rope_head_dim": 8,
        "index_n_heads": 16,
    },
    "ratio 8, sigmoid, no hash layers": {
        "compress_ratios": [8, 8, 4, 0],
        "sliding_window": 7,
        "index_topk": 3,
        "index_n_heads": 24,
        "num_hash_layers": 0,
        "scoring_func": "sigmoid",
    },
    "ratio 128, two streams, hash layers": {
        "compress_ratios": [4, 128, 4, 128],
        "sliding_window": 128,
        "index_topk": 16,
        "index_n_heads": 16,
        "num_hash_layers": 3,
        "hc_mult": 2,
        "n_routed_experts": 9,
        "num_experts_per_tok": 4,
    },
    "odd sizes": {
        "compress_ratios": [4, 3, 0, 3],
        "hidden_size": 72,
        "head_dim": 24,
        "qk_rope_head_dim": 6,
        "q_lora_rank": 20,
        "o_groups": 1,
        "o_lora_rank": 40,
        "moe_intermediate_size": 20,
        "index_n_heads": 16,
        "hc_sinkhorn_iters": 3,
        "hc_eps": 1e-3,
        "rms_norm_eps": 1e-4,
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For transformers; its many small operations only get slower on two."""
    with one_torch_thread():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_every_position(name: str) -> None:
    source = random_source(seed=len(name), **CONFIGS[name])
    compare(source, transformers_model(source, decoded(source)), LENGTHS)


def test_routed_experts_are_clamped() -> None:
    """transformers clamps the shared expert too; here it stays far below the limit."""
    source = random_source(seed=3, swiglu_limit=0.4, index_n_heads=16)
    for name, tensor in source.tensors.items():
        if "shared_experts.w1" in name or "shared_experts.w3" in name:
            source.tensors[name] = Tensor(F32, tensor.shape, tensor.decode() / np.float32(64))
    their = transformers_model(source, decoded(source))
    compare(source, their, [20, 150])
    unlimited = MemorySource(random_source(swiglu_limit=1e6).config, source.tensors)
    prompt = tokens(source, 20)
    moved = forward(source, [prompt]).logits[0] - forward(unlimited, [prompt]).logits[0]
    assert moved.abs().max() > 0.01, "the limit was never met"


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_golden_checkpoints(case: str) -> None:
    with Checkpoint.open(golden(case)) as ckpt:
        everything = {
            name: torch.from_numpy(t.codes if t.format.kind == "i64" else t.decode())
            for name, t in ((name, ckpt.read(name)) for name in ckpt.specs)
        }
        compare(ckpt, transformers_model(ckpt, everything), [1, 21, 300])


def compare(source: Any, their: torch.nn.Module, lengths: list[int]) -> None:
    prompts = [tokens(source, length, seed=length) for length in lengths]
    with torch.no_grad():
        expected = [their(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for decode in (0, 5):
        found = forward(source, prompts, decode=decode, threads=2).logits
        for length, ours, theirs in zip(lengths, found, expected, strict=True):
            worst = (ours - theirs).abs().amax(-1)  # [positions]
            assert worst.max() < TOLERANCE, f"{length} tokens, position {int(worst.argmax())}"
