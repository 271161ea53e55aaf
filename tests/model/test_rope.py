"""Rotations against complex multiplication, and YaRN against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsv4_quant.config import RopeScaling, parse_config
from dsv4_quant.model.rope import Rope, yarn
from tests.model.random_model import BASE


@pytest.mark.parametrize("compressed", [False, True])
def test_pairs_turn_like_complex_numbers(compressed: bool) -> None:
    config = parse_config({**BASE, "rope_scaling": None})
    rope = Rope(config, compressed=compressed, length=50)
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 20, 49])
    turned = rope(x, positions)
    base = 160000.0 if compressed else 10000.0
    angles = positions[:, None].double() / base ** (torch.arange(0, 16, 2).double() / 16)
    pairs = torch.view_as_complex(x[..., 16:].double().reshape(4, 3, 8, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None])
    torch.testing.assert_close(turned[..., 16:].double(), expected.flatten(-2), rtol=0, atol=1e-5)
    assert torch.equal(turned[..., :16], x[..., :16]) and torch.equal(turned[0], x[0])
    torch.testing.assert_close(rope(turned, positions, inverse=True), x)


@pytest.mark.parametrize(
    ("dim", "base", "length"), [(64, 160000.0, 65536), (16, 10000.0, 64), (6, 160000.0, 128)]
)
def test_yarn(dim: int, base: float, length: int) -> None:
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling: dict[str, Any] = {
        "factor": 16.0,
        "original_max_position_embeddings": length,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = PreTrainedConfig(
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=16 * length,
        rope_parameters={"rope_type": "yarn", "rope_theta": base, **scaling},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    speeds = 1 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    torch.testing.assert_close(yarn(speeds, base, RopeScaling(**scaling)), expected)


def test_yarn_without_a_ramp_is_a_step() -> None:
    """Where beta_fast and beta_slow meet on a dim: here the one that turns L / (2 * pi) times."""
    turns = 4 / (2 * math.pi)
    scaling = RopeScaling(4.0, 4, beta_fast=turns, beta_slow=turns)
    assert yarn(torch.ones(8), 10000.0, scaling).tolist() == [1.0] + 7 * [0.25]
