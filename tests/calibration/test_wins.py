"""Calibration wins on prompts it has not seen, where inputs are correlated; else it does nothing.

``benchmarks/calibration.py`` measures the same on a larger model, from and to more formats.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.calibration import Bench, structured
from dsv4_quant.formats.blocks import FP4, Tensor
from dsv4_quant.formats.rules import ScaleRule
from tests.model.random_model import random_source

TOKENS = 512
"""Some 170 for every expert, whose matrices have 64 and 32 columns."""


def bench(structure: str, folder: Path) -> Bench:
    source = random_source(vocab_size=1024, num_hidden_layers=3, compress_ratios=[0, 4, 16])
    return Bench(structured(source, structure), folder)


def output_error(bench: Bench, experts: dict[str, Tensor]) -> float:
    found = bench.output_errors(experts).values()
    return sum(error for error, _ in found) / sum(size for _, size in found)


@pytest.mark.parametrize(
    ("structure", "error", "kl"), [("decaying", 0.8, 0.95), ("outliers", 0.7, 0.9)]
)
def test_less_output_error_and_less_divergence(
    structure: str, error: float, kl: float, tmp_path: Path
) -> None:
    one = bench(structure, tmp_path)
    least = one.plain(FP4, ScaleRule.LEAST_SQUARES)
    made = one.calibrated(least, one.calibrate(TOKENS), None)
    assert all((made[name].scales == least[name].scales).all() for name in made)
    assert output_error(one, made) < error * output_error(one, least)
    assert one.kl(made)[1] < kl * one.kl(least)[1], "the median: it does not hang on a few tokens"


def test_white_inputs_lose_nothing(tmp_path: Path) -> None:
    one = bench("white", tmp_path)
    least = one.plain(FP4, ScaleRule.LEAST_SQUARES)
    made = one.calibrated(least, one.calibrate(TOKENS), None)
    assert output_error(one, made) < 1.01 * output_error(one, least)
