"""SQNR of the weights that are no experts': layers down, weights across, every figure written."""

from __future__ import annotations

from dsv4_quant.reports.colours import PALETTE, hexadecimal, index, ink
from dsv4_quant.reports.figures import decibels
from dsv4_quant.reports.markup import Markup, figure, join, tag
from dsv4_quant.reports.recast import Recast, Rows, by_layer, grouped


def grid(rows: Rows) -> Markup:
    """rows: none of them an expert's."""
    layers = by_layer(rows)
    names = list(grouped((row for held in layers.values() for row in held), lambda row: row.within))
    head = tag("tr", tag("th", "layer"), *(tag("th", _breakable(name)) for name in names))
    body = []
    for layer, held in layers.items():
        cells = {row.within: row for row in held}
        body.append(tag("tr", tag("th", layer), *(_cell(cells.get(name)) for name in names)))
    return tag(
        "div", tag("table", tag("thead", head), tag("tbody", *body), class_="cells"), class_="wide"
    )


def _cell(row: Recast | None) -> Markup:
    if row is None:
        return tag("td")
    back = PALETTE[index(row.cost.sqnr)]
    shown = decibels(row.cost.sqnr)
    return tag(
        "td", figure(row.cost.sqnr, shown), title=row.name,
        style=f"background:{hexadecimal(back)};color:{ink(back)}",
    )  # fmt: skip


def _breakable(name: str) -> Markup:
    first, *rest = name.split(".")
    return join(first, *(part for piece in rest for part in (".", tag("wbr"), piece)))
