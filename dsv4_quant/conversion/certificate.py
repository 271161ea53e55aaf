"""The certificate: what the exact casts of a conversion proved, and where they came closest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dsv4_quant.checkpoint.manifest import Certificate
from dsv4_quant.conversion.operations import Panel, Proof
from dsv4_quant.conversion.plan import COPY, Plan


class Proven(Protocol):
    """The result of a weight's step, as far as it matters here."""

    @property
    def proof(self) -> Proof: ...


def certificates(plan: Plan, results: Mapping[str, Proven]) -> dict[str, Certificate]:
    """Per operation, what its tiles proved; copies need no proof, rounded weights have none."""
    names: dict[str, list[str]] = {}
    for step in plan.steps:
        if not step.out.is_scale and step.operation != COPY and not step.lossy:
            names.setdefault(step.operation, []).append(step.spec.name)
    return {operation: _certificate(results, weights) for operation, weights in names.items()}


def _certificate(results: Mapping[str, Proven], names: list[str]) -> Certificate:
    spreads: dict[int, int] = {}
    for name in names:
        for spread, count in results[name].proof.spreads.items():
            spreads[spread] = spreads.get(spread, 0) + count
    worst = None
    if spreads:
        widest = max(spreads)
        name = next(name for name in names if results[name].proof.spreads.get(widest))
        place = results[name].proof.worst
        assert place is not None and place[0] == widest
        worst = f"{name} tile {place[1]}, {place[2]}"
    return Certificate(
        tiles=sum(results[name].proof.tiles for name in names),
        tensors=len(names),
        spreads=dict(sorted(spreads.items())),
        worst=worst,
    )


def find_tile(panel: Panel, spread: int) -> tuple[int, int]:
    """The first tile of a FP4 panel whose exponents lie that far apart; zero blocks aside."""
    tensor, after = panel.tensor, panel.after
    assert after.block is not None and tensor.format.block is not None
    assert tensor.scales is not None
    (b, c), group = after.block, tensor.format.block[1]
    rows, groups = tensor.scales.shape
    used = (tensor.codes.reshape(rows, groups, group // 2) & 0x77).any(axis=2)
    low = np.where(used, tensor.scales, 255).astype(np.int16)
    high = np.where(used, tensor.scales, 0).astype(np.int16)
    row_starts, group_starts = np.arange(0, rows, b), np.arange(0, groups, c // group)
    low = np.minimum.reduceat(np.minimum.reduceat(low, row_starts, 0), group_starts, 1)
    high = np.maximum.reduceat(np.maximum.reduceat(high, row_starts, 0), group_starts, 1)
    row, col = np.argwhere(np.maximum(high - low, 0) == spread)[0]
    return panel.first_row // b + int(row), int(col)
