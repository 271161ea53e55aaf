"""The page's tables of weights: by role, by layer, the worst, those apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4_quant.formats.cost import Cost
from dsv4_quant.reports.bars import bar
from dsv4_quant.reports.figures import (
    decibels,
    magnitude,
    part,
    percent,
    relative_error,
)
from dsv4_quant.reports.markup import Markup, figure, tag
from dsv4_quant.reports.recast import Recast, Rows, by_layer, by_role, sums, worst

FIGURES = ("SQNR dB", "rms error", "largest error", "saturated", "flushed", "exact blocks")


def table(head: Sequence[str], rows: Iterable[Markup], class_: str | None = None) -> Markup:
    """In a box that scrolls on its own where the window is narrow."""
    heads = tag("tr", *(tag("th", name, scope="col") for name in head))
    held = tag("table", tag("thead", heads), tag("tbody", *rows), class_=class_)
    return tag("div", held, class_="wide")


def figures(cost: Cost) -> list[Markup]:
    """One cell for each of FIGURES."""
    return [
        _number(cost.sqnr, decibels(cost.sqnr)),
        _number(relative_error(cost), percent(relative_error(cost))),
        _number(cost.largest_error, magnitude(cost.largest_error)),
        _number(cost.saturated, f"{cost.saturated:,}"),
        _share(cost.flushed, cost.values),
        _number(cost.exact_share, percent(cost.exact_share)),
    ]


def _number(value: float, shown: str) -> Markup:
    return tag("td", figure(value, shown), class_="number")


def _share(count: int, of: int) -> Markup:
    return tag("td", figure(count, f"{count:,}"), tag("small", f" {percent(part(count, of))}"),
               class_="number")  # fmt: skip


def worst_table(rows: Rows, count: int) -> Markup:
    """The lowest SQNR."""
    body = [
        tag("tr", tag("th", row.name, scope="row"), *figures(row.cost))
        for row in worst(rows, count)
    ]
    return table(("weight", *FIGURES), body, "names")


def role_table(rows: Rows) -> Markup:
    """With bars of the error, and where the model's squared error lies."""
    groups = by_role(rows)
    costs = sums(groups)
    whole = sum(cost.error_squares for cost in costs.values())
    most = max((relative_error(cost) for cost in costs.values()), default=0.0)
    body = []
    for role, cost in costs.items():
        error, share = relative_error(cost), part_of(cost.error_squares, whole)
        body.append(
            tag(
                "tr",
                tag("th", role, scope="row"),
                _number(len(groups[role]), f"{len(groups[role]):,}"),
                tag("td", bar(error, most), class_="barred"),
                tag("td", figure(error, percent(error)), class_="number"),
                _number(cost.sqnr, decibels(cost.sqnr)),
                _number(cost.error_squares, magnitude(cost.error_squares)),
                _number(share, percent(share)),
                *figures(cost)[2:],
            )
        )
    head = ("role", "weights", "rms error", "", "SQNR dB", "squared error", "share of it")
    return table((*head, *FIGURES[2:]), body, "names")


def part_of(value: float, whole: float) -> float:
    """value / whole; 0 of nothing."""
    return value / whole if whole else 0.0


def layer_table(rows: Rows) -> Markup:
    """Each layer with its worst weight."""
    body = []
    for layer, held in by_layer(rows).items():
        (lowest,) = worst(held, 1)
        cost = sums({layer: held})[layer]
        body.append(
            tag(
                "tr",
                tag("th", layer, scope="row"),
                _number(len(held), f"{len(held):,}"),
                *figures(cost),
                tag("td", _within(lowest)),
                _number(lowest.cost.sqnr, decibels(lowest.cost.sqnr)),
            )
        )
    return table(("layer", "weights", *FIGURES, "worst weight", "its SQNR dB"), body, "names")


def _within(row: Recast) -> str:
    return row.within if row.spec.expert is None else f"expert {row.spec.expert} {row.within}"
