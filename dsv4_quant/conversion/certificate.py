"""The certificate: what the exact casts of a conversion proved, and where they came closest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint.manifest import Certificate
from dsv4_quant.checkpoint.panels import panel_rows, row_ranges
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.plan import COPY, Plan
from dsv4_quant.conversion.stream import Result
from dsv4_quant.formats.blocks import Format


def certificates(plan: Plan, results: Mapping[str, Result]) -> dict[str, Certificate]:
    """Per operation, what its tiles proved; copies need no proof."""
    names: dict[str, list[str]] = {}
    for step in plan.steps:
        if not step.out.is_scale and step.operation != COPY and not step.lossy:
            names.setdefault(step.operation, []).append(step.spec.name)
    return {operation: _certificate(plan, results, weights) for operation, weights in names.items()}


def _certificate(plan: Plan, results: Mapping[str, Result], names: list[str]) -> Certificate:
    spreads: dict[int, int] = {}
    for name in names:
        for spread, count in results[name].proof.spreads.items():
            spreads[spread] = spreads.get(spread, 0) + count
    worst = None
    if spreads:
        widest = max(spreads)
        name = next(name for name in names if results[name].proof.spreads.get(widest))
        after = plan.catalogue.specs[name].format
        row, col = find_tile(plan.source, plan.source.specs[name], after, widest)
        worst = f"{name} tile {row}, {col}"
    return Certificate(
        tiles=sum(results[name].proof.tiles for name in names),
        tensors=len(names),
        spreads=dict(sorted(spreads.items())),
        worst=worst,
    )


def find_tile(source: Checkpoint, spec: TensorSpec, after: Format, spread: int) -> tuple[int, int]:
    """The first tile of a FP4 weight whose exponents lie that far apart; zero blocks aside."""
    assert after.block is not None and spec.format.block is not None
    (b, c), group = after.block, spec.format.block[1]
    for start, stop in row_ranges(spec.matrix[0], panel_rows(spec, (after,))):
        panel = source.read_rows(spec.name, start, stop)
        assert panel.scales is not None
        rows, groups = panel.scales.shape
        used = (panel.codes.reshape(rows, groups, group // 2) & 0x77).any(axis=2)
        low = np.where(used, panel.scales, 255).astype(np.int16)
        high = np.where(used, panel.scales, 0).astype(np.int16)
        row_starts, group_starts = np.arange(0, rows, b), np.arange(0, groups, c // group)
        low = np.minimum.reduceat(np.minimum.reduceat(low, row_starts, 0), group_starts, 1)
        high = np.maximum.reduceat(np.maximum.reduceat(high, row_starts, 0), group_starts, 1)
        hits = np.argwhere(np.maximum(high - low, 0) == spread)
        if len(hits):
            return start // b + int(hits[0][0]), int(hits[0][1])
    raise AssertionError("the histogram counted a tile that is not there")
