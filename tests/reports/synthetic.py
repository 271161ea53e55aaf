"""Rows as a requantising run would make them: plausible figures without any weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsv4_quant.catalogue import Catalogue, Formats, TensorSpec
from dsv4_quant.config import read_config
from dsv4_quant.fingerprints.compare import Apart, Comparison
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.formats.cost import Cost
from dsv4_quant.reports.page import Run
from dsv4_quant.reports.recast import Recast

CONFIGS = Path(__file__).parent.parent / "configs"
FP8 = fp8((128, 128))
RUN = Run(
    source="deepseek-ai/DeepSeek-V4-Flash-Base@0123abc",
    output="flash-fp4",
    rule="least-squares",
    source_digest="5f" * 32,
    output_digest="a0" * 32,
)


def catalogue(layers: int | None, experts: int | None, config: str = "V4-Flash") -> Catalogue:
    """Of a published model, or of a part of it: so many layers and experts."""
    whole = read_config(CONFIGS / f"{config}.json")
    if layers is not None and experts is not None:
        ratios = whole.compress_ratios[:layers] + whole.compress_ratios[-1:]
        whole = replace(
            whole, num_hidden_layers=layers, n_routed_experts=experts, compress_ratios=ratios
        )
    return Catalogue(whole, Formats(FP4, FP8, FP8))


def cost(
    rng: np.random.Generator, spec: TensorSpec, sqnr: float, *, saturated: float = 2e-5
) -> Cost:
    """Of a weight of normal values with a standard deviation of 0.02."""
    values = math.prod(spec.shape)
    squares = values * 0.02**2 * float(rng.uniform(0.8, 1.25))
    size = math.prod(spec.format.block or (1, values))
    blocks = -(-values // size)
    centre = -6 if spec.format.kind == "fp4" else -12
    shares = np.exp(-0.5 * ((np.arange(-9, 10) - rng.normal(0, 0.3)) / 1.3) ** 2)
    counts = np.floor(shares / shares.sum() * blocks).astype(int)
    exponents = Counter({centre + i - 9: int(n) for i, n in enumerate(counts) if n})
    return Cost(
        values=values,
        value_squares=squares,
        error_squares=squares / 10 ** (sqnr / 10) if math.isfinite(sqnr) else 0.0,
        largest_error=0.0 if sqnr == math.inf else float(rng.uniform(0.01, 0.06)),
        saturated=0 if sqnr == math.inf else int(values * saturated * rng.uniform(0.5, 1.5)),
        flushed=0 if sqnr == math.inf else int(values * 0.09 * rng.uniform(0.9, 1.1)),
        blocks=blocks,
        exact_blocks=blocks if sqnr == math.inf else int(blocks * 2e-4 * rng.uniform(0, 2)),
        exponents=exponents,
    )


def rows(
    found: Catalogue, *, before: Format = FP8, dense: Format | None = None, bad: int = 3
) -> list[Recast]:
    """Experts that became FP4, and other quantised weights that became FP8 if they are given."""
    rng = np.random.default_rng(7)
    specs = [s for s in found.specs.values() if s.kind != "fixed"]
    experts = [spec for spec in specs if spec.expert is not None]
    chosen = (
        {experts[i].name for i in rng.choice(len(experts), bad, replace=False)} if bad else set()
    )
    shifts = rng.normal(0, 0.25, len(found.config.compress_ratios) + 1)
    made = []
    for spec in specs:
        shift = float(shifts[spec.layer or 0])
        if spec.expert is not None:
            sqnr = 18.8 + shift - 0.4 * (".w2." in spec.name) + float(rng.normal(0, 0.15))
            sqnr -= float(rng.uniform(4, 12)) * (spec.name in chosen)
            made.append(Recast(spec, before, cost(rng, spec, sqnr)))
        elif dense is not None:
            is_exact = rng.random() < 0.05
            sqnr = math.inf if is_exact else 31.4 + shift + float(rng.normal(0, 0.1))
            made.append(Recast(spec, dense, cost(rng, spec, sqnr, saturated=0)))
    return made


def comparison(kl: float = 0.03) -> Comparison:
    """Six prompts of a few spots each."""
    rng = np.random.default_rng(3)
    spots = []
    for prompt in range(6):
        for position in range(4 + prompt):
            same = None if rng.random() < 0.2 else bool(rng.random() < 0.97)
            spots.append(Apart(prompt, position, same, float(kl * rng.uniform(0.3, 1.7)), 0.5))
    return Comparison(tuple(spots), ())


def tiny(*, before: Format = FP8, dense: Format | None = BF16) -> list[Recast]:
    """Six layers of eight experts, and an MTP block."""
    return rows(catalogue(6, 8), before=before, dense=dense, bad=2)
