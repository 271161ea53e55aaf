"""The deployed arithmetic is what the published code computes, within the noise of its quantisers.

In float32 the quantisers are the only rounding, and short prompts agree to 1e-6. One value that
falls on the other side of a rounding is amplified from layer to layer, so longer prompts, and
bfloat16 with its many roundings, agree in the mean only. How little it takes was measured: noise
of 1e-7 on every sum moves bfloat16 logits by 0.02 to 0.05 on average; their deviation is 1.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.model import forward
from tests.folders import GOLDEN, golden

SHORT = 21
"""Tokens up to which float32 agrees closely."""

CLOSE, MEAN = 1e-4, 0.06


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_logits_and_mtp_logits(case: str, activations: Any) -> None:
    facts = json.loads((GOLDEN / case / "expected.json").read_bytes())
    held = load_file(GOLDEN / case / "logits.safetensors")
    prompts, steps = facts["prompts"], facts["decode_steps"]
    name = "bf16" if activations == "bfloat16" else "float32"
    with Checkpoint.open(golden(case)) as ckpt:
        found = forward(
            ckpt, prompts, arithmetic="deployed", activations=activations, decode=steps, mtp=True
        )
    assert found.mtp_logits is not None
    differences = []
    for number, prompt in enumerate(prompts):
        expected = held[f"{name}.logits.{number}"].flatten(0, -2)  # [steps + 1 or 1, vocab]
        assert len(expected) == (steps + 1 if len(prompt) > steps + 1 else 1)
        ours = found.logits[number][-len(expected) :]
        mtp = held[f"{name}.mtp_logits.{number}"].flatten()  # of the last position
        pair = torch.cat((ours - expected, (found.mtp_logits[number][-1] - mtp)[None])).abs()
        if name == "float32" and len(prompt) <= SHORT:
            assert pair.max() < CLOSE, f"{len(prompt)} tokens"
        elif name == "float32":
            assert pair.mean() < MEAN, f"{len(prompt)} tokens"
        differences.append(pair)
    assert torch.cat(differences).mean() < MEAN
