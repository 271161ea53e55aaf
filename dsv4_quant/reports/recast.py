"""Weights that are stored otherwise than before, and what that cost: sums and rankings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dsv4_quant.catalogue import TensorSpec, stored
from dsv4_quant.formats.blocks import Format, Kind
from dsv4_quant.formats.cost import Cost, total

APART = 3.0
"""A weight stands apart if its SQNR is that many dB (half the noise) below its group's median."""

NORMAL: dict[Kind, float] = {"fp4": 19.0, "fp8": 31.5, "bf16": 55.6}
"""SQNR in dB of normally distributed values: what a format gives without any luck.

FP4 in blocks of 32 with least-squares scales (max-based: 18.7), FP8 in any block, BF16. Measured;
tests/reports/test_recast.py repeats it.
"""

TOP_LEVEL = "top level"


@dataclass(frozen=True, slots=True)
class Recast:
    """One weight."""

    spec: TensorSpec
    """As the output stores it."""
    before: Format
    cost: Cost

    @property
    def name(self) -> str:
        """The weight's tensor name."""
        return self.spec.name

    @property
    def after(self) -> Format:
        """The format in the output."""
        return self.spec.format

    @property
    def layer(self) -> str:
        """``layers.3`` or ``mtp.0``."""
        if self.spec.layer is None:
            return TOP_LEVEL
        return ".".join(self.name.split(".")[:2])

    @property
    def within(self) -> str:
        """What the weight is called within its layer or expert: ``w1``, ``attn.wq_a``."""
        parts = self.name.removesuffix(".weight").split(".")
        if self.spec.expert is not None:
            return parts[-1]
        return ".".join(parts if self.spec.layer is None else parts[2:])

    @property
    def role(self) -> str:
        """The catalogue's role; experts by matrix, and those of the MTP blocks on their own."""
        if self.spec.expert is None:
            return self.spec.role
        mtp = "mtp " if self.spec.role == "mtp" else ""
        return f"{mtp}experts {self.within}"


Rows = Sequence[Recast]


def recasts(
    before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec], costs: Mapping[str, Cost]
) -> list[Recast]:
    """The weights that have a cost, from the catalogues of the source and of the output."""
    return [
        Recast(spec, before[name].format, costs[name])
        for name, spec in after.items()
        if name in costs
    ]


def model(rows: Iterable[Recast]) -> Cost:
    """The sum over all weights."""
    return total(row.cost for row in rows)


def by_layer(rows: Rows) -> dict[str, Rows]:
    """In the model's order, MTP blocks last of the layers."""
    ordered = sorted(rows, key=lambda row: (row.spec.layer is None, row.spec.layer or 0))
    return grouped(ordered, lambda row: row.layer)


def by_role(rows: Rows) -> dict[str, Rows]:
    """By name of the role."""
    return grouped(sorted(rows, key=lambda row: row.role), lambda row: row.role)


def grouped(rows: Iterable[Recast], key: Callable[[Recast], str]) -> dict[str, Rows]:
    """In the order in which the keys come first."""
    groups: dict[str, list[Recast]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(groups)


def sums(groups: dict[str, Rows]) -> dict[str, Cost]:
    """One Cost per group."""
    return {name: model(rows) for name, rows in groups.items()}


def worst(rows: Iterable[Recast], count: int) -> list[Recast]:
    """By SQNR, lowest first, and those without one (NaN) before all; then by name."""
    return sorted(rows, key=_rank)[:count]


def _rank(row: Recast) -> tuple[float, str]:
    sqnr = row.cost.sqnr
    return -math.inf if math.isnan(sqnr) else sqnr, row.name


@dataclass(frozen=True, slots=True)
class Apart:
    """A weight that lost far more than its like."""

    row: Recast
    typical: float
    """Median SQNR of its group in dB."""


def apart(rows: Rows) -> list[Apart]:
    """Weights more than :data:`APART` below the median of the inexact ones of their role and
    formats, worst first."""
    found = {}
    for group in grouped(rows, lambda row: f"{row.role}: {row.before} to {row.after}").values():
        known = [sqnr for row in group if math.isfinite(sqnr := row.cost.sqnr)]
        typical = median(known) if known else math.nan
        for row in group:
            if not math.isinf(row.cost.sqnr) and not row.cost.sqnr >= typical - APART:
                found[row.name] = Apart(row, typical)
    return [found[row.name] for row in worst((one.row for one in found.values()), len(found))]


def casts(rows: Rows) -> dict[str, Rows]:
    """By formats, such as ``fp8 128x128 e8m0 → fp4 1x32 e8m0``, most weights first."""
    groups = grouped(rows, lambda row: f"{row.before} → {row.after}")
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def sizes(rows: Rows) -> tuple[int, int]:
    """Bytes of these weights before and after, scales included."""
    before = Counter((row.spec.shape, row.before) for row in rows)
    after = Counter((row.spec.shape, row.after) for row in rows)
    spec = rows[0].spec  # stands for all: its name and place take no bytes
    return _bytes(spec, before), _bytes(spec, after)


def _bytes(spec: TensorSpec, kinds: Mapping[tuple[tuple[int, ...], Format], int]) -> int:
    return sum(
        count * tensor.nbytes
        for (shape, form), count in kinds.items()
        for tensor in stored(spec._replace(shape=shape, format=form), "hf")
    )
