"""Every expert of every layer, in rows and columns: what the heat map shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv4_quant.formats.cost import Cost, total
from dsv4_quant.reports.recast import Recast, by_layer

ALL = "all"
"""The view in which an expert's matrices are one: their squares added."""


@dataclass(frozen=True, slots=True)
class Field:
    """l layers by e experts."""

    layers: tuple[str, ...]
    experts: int
    views: dict[str, list[list[Cost | None]]]
    """``[l][e]`` by matrix, :data:`ALL` first; None where nothing was requantised. Without the
    scale exponents."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """Such as w1, w2, w3."""
        return tuple(name for name in self.views if name != ALL)


def make_field(rows: Sequence[Recast]) -> Field:
    """Of the rows that are experts' weights."""
    held = [row for row in rows if row.spec.expert is not None]
    layers = tuple(by_layer(held))
    number = {layer: i for i, layer in enumerate(layers)}
    experts = max((row.spec.expert or 0 for row in held), default=-1) + 1
    matrices = sorted({row.within for row in held})
    views: dict[str, list[list[Cost | None]]] = {
        name: [[None] * experts for _ in layers] for name in (ALL, *matrices)
    }
    for row in held:
        assert row.spec.expert is not None
        bare = replace(row.cost, exponents=Counter())  # to add these up is most of the time
        views[row.within][number[row.layer]][row.spec.expert] = bare
    for i in range(len(layers)):
        for expert in range(experts):
            costs = [c for name in matrices if (c := views[name][i][expert]) is not None]
            views[ALL][i][expert] = total(costs) if costs else None
    return Field(layers, experts, views)


def data(field: Field) -> dict[str, object]:
    """The figures of every cell, rounded, for the page's script.

    sqnr in hundredths of a dB, ``exact`` for infinite; largest error with three digits; exact: per
    cent of the blocks, likewise. null where there is no weight.
    """
    cells = {
        name: {
            "sqnr": [[c and _hundredths(c.sqnr) for c in row] for row in field.views[name]],
            "largest": [
                [c and _rounded(c.largest_error) for c in row] for row in field.views[name]
            ],
            "saturated": [[c and c.saturated for c in row] for row in field.views[name]],
            "flushed": [[c and c.flushed for c in row] for row in field.views[name]],
            "exact": [[c and _share(c.exact_share) for c in row] for row in field.views[name]],
        }
        for name in field.matrices
    }
    return {"layers": field.layers, "matrices": field.matrices, "cells": cells}


def _hundredths(sqnr: float) -> int | str:
    if math.isfinite(sqnr):
        return round(sqnr * 100)
    return "exact" if sqnr == math.inf else str(sqnr)


def _rounded(value: float) -> float | str:
    number = float(f"{value:.3g}")
    if not math.isfinite(number):
        return str(number)
    return int(number) if number == int(number) else number


def _share(share: float) -> float:
    """Per cent with three digits, and 100 only of all."""
    value = float(f"{100 * share:.3g}")
    if share < 1:
        value = min(value, 99.9)
    return int(value) if value == int(value) else value
