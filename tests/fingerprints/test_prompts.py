"""The prompts reach what they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.config import ModelConfig, read_config
from dsv4_quant.errors import UnreadableError
from dsv4_quant.fingerprints.prompts import LONGEST, choose_prompts, cover_experts, prompt_lengths
from dsv4_quant.formats.blocks import Tensor
from tests.fingerprints.damage import Altered

CONFIGS = Path(__file__).parents[1] / "configs"


def config(name: str) -> ModelConfig:
    return read_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("V4-Flash", [1, 5, 129, 2304]),
        ("V4-Flash-0731", [1, 5, 129, 2304]),
        ("V4-Pro", [1, 5, 129, 4608]),
    ],
)
def test_published_models(name: str, lengths: list[int]) -> None:
    assert prompt_lengths(config(name)) == lengths


@pytest.mark.parametrize("name", ["V4-Flash", "V4-Pro"])
def test_the_boundaries_are_crossed(name: str) -> None:
    c = config(name)
    lengths = prompt_lengths(c)
    assert {4 + 1, 128 + 1, c.sliding_window + 1} <= set(lengths)
    assert max(lengths) // 4 > c.index_topk and max(lengths) // 128 >= 2


def test_what_a_model_has_not_is_not_crossed() -> None:
    flash = config("V4-Flash")
    plain = replace(flash, num_hidden_layers=2, compress_ratios=(0, 0, 0))
    assert prompt_lengths(plain) == [1, 129, 258]
    absurd = replace(flash, index_topk=1 << 24, sliding_window=1 << 24)
    assert max(prompt_lengths(absurd)) == LONGEST


def test_every_expert_of_the_hash_layers_is_reached(ckpt: Checkpoint) -> None:
    prompts = choose_prompts(ckpt)
    assert [len(prompt) for prompt in prompts] == prompt_lengths(ckpt.config)
    tokens = sorted({token for prompt in prompts for token in prompt})
    table = ckpt.read("layers.0.ffn.gate.tid2eid").codes
    assert set(table[tokens].reshape(-1)) == set(range(ckpt.config.n_routed_experts))
    assert choose_prompts(ckpt) == prompts
    assert len(tokens) == sum(map(len, prompts)), "no token twice while there are others"
    assert max(tokens) < ckpt.config.vocab_size


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=60).map(
        np.array
    )
)
def test_a_cover_names_everything_and_nothing_in_vain(table: np.ndarray) -> None:
    chosen = cover_experts(table)
    assert set(table[chosen].reshape(-1)) == set(table.reshape(-1))
    seen: set[int] = set()
    for token in chosen:
        assert set(table[token]) - seen, "a token that names nothing new"
        seen |= set(table[token])


def test_a_cover_of_a_real_shape_is_small() -> None:
    """Three tables of 129,280 tokens with 6 of 256 experts each, as V4-Flash has them."""
    draws = np.random.default_rng(0).random((3, 4096, 256)).argsort(-1)[..., :6]
    table = np.concatenate([layer + 256 * i for i, layer in enumerate(draws)], axis=1)
    assert len(cover_experts(table)) < 110  # 43 would be the least; 2,439 tokens are there


def test_an_expert_that_does_not_exist(ckpt: Checkpoint) -> None:
    def alter(name: str, held: Tensor) -> Tensor:
        if not name.endswith("tid2eid"):
            return held
        codes = held.codes.copy()
        codes[7, 1] = ckpt.config.n_routed_experts
        return replace(held, codes=codes)

    with pytest.raises(UnreadableError, match=r"layers\.0\.ffn\.gate\.tid2eid"):
        choose_prompts(Altered(ckpt, alter))
