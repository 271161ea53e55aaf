"""SQNR of every expert of every layer as a picture, and beside it how far each layer spreads.

The picture is an image, so that it is there without a script; the script only tells the figures
under the pointer. A single bad expert of hundreds is a few pixels: the spread beside it shows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_quant.formats.cost import Cost, total
from dsv4_quant.reports.colours import PALETTE, hexadecimal, index, ink
from dsv4_quant.reports.field import ALL, Field, data
from dsv4_quant.reports.figures import decibels
from dsv4_quant.reports.legend import legend
from dsv4_quant.reports.markup import Markup, join, tag
from dsv4_quant.reports.png import address, png
from dsv4_quant.reports.recast import APART
from dsv4_quant.reports.scales import Axis, ticks

LEFT, WIDTH, GAP, SPREAD, RIGHT = 58, 690, 26, 190, 96
HEAD, FOOT = 34, 36
READABLE = 40
"""Pixels that a cell needs to have its figure written into it."""

Costs = Sequence[Cost | None]


@dataclass(frozen=True, slots=True)
class _Row:
    """One layer in one view, in SQNR."""

    layer: str
    cells: list[float | None]
    whole: float
    finite: dict[int, float]
    """By expert, without the exact ones."""


def heatmap(field: Field) -> Markup:
    """The views with their switch, the legend and the figures."""
    known = [c.sqnr for view in field.views.values() for row in view for c in row if c is not None]
    finite = [sqnr for sqnr in known if math.isfinite(sqnr)] or [0.0]
    axis = Axis(5 * math.floor(min(finite) / 5), 5 * math.ceil(max(finite) / 5 + 0.01), SPREAD)
    switches, maps = [], []
    for i, (name, view) in enumerate(field.views.items()):
        checked = "checked" if i == 0 else None
        label = "all matrices of an expert" if name == ALL else name
        switches += [
            tag("input", type="radio", name="view", id=f"view-{i}", checked=checked),
            tag("label", label, for_=f"view-{i}"),
        ]
        rows = [_row(layer, costs) for layer, costs in zip(field.layers, view, strict=True)]
        maps.append(tag("div", _map(rows, field.experts, axis, label), class_=f"map map-{i}"))
    figures = json.dumps(data(field), separators=(",", ":")).replace("<", "\\u003c")
    return join(
        tag("div", *switches, *maps, class_="views"),
        legend(),
        tag("div", id="readout", role="status", hidden=""),
        tag("script", Markup(figures), type="application/json", id="cells"),
    )


def _row(layer: str, costs: Costs) -> _Row:
    cells = [None if cost is None else cost.sqnr for cost in costs]
    finite = {i: sqnr for i, sqnr in enumerate(cells) if sqnr is not None and math.isfinite(sqnr)}
    whole = total(cost for cost in costs if cost is not None).sqnr
    return _Row(layer, cells, whole, finite)


def _map(rows: Sequence[_Row], experts: int, axis: Axis, label: str) -> Markup:
    height = min(max(round(600 / len(rows)), 12), 26)
    tall, wide = height * len(rows), LEFT + WIDTH + GAP + SPREAD + RIGHT
    cells = png([bytes(index(sqnr) for sqnr in row.cells) for row in rows], PALETTE)
    lowest = min((min(row.finite.values()) for row in rows if row.finite), default=math.inf)
    said = (
        f"Heat map of SQNR, {label}: {len(rows)} layers by {experts} experts;"
        f" lowest {decibels(lowest)} dB. The tables below name the worst weights and layers."
    )
    place = {"x": LEFT, "y": HEAD, "width": WIDTH, "height": tall}
    svg = tag(
        "svg",
        tag("image", **place, href=address(cells), preserveAspectRatio="none"),
        *(_left(row, HEAD + i * height, height) for i, row in enumerate(rows)),
        *_written(rows, experts, height),
        *_experts(experts, HEAD + tall),
        *_spread_axis(axis, tall),
        *(_spread(row, axis, HEAD + (i + 0.5) * height) for i, row in enumerate(rows)),
        tag("rect", **place, class_="field", tabindex=0, role="application",
            aria_label="Cells: arrow keys move, the figures are read out"),
        tag("rect", class_="cursor", width=WIDTH / experts, height=height, visibility="hidden"),
        viewBox=f"0 0 {wide} {HEAD + tall + FOOT}", role="group", aria_label=said,
    )  # fmt: skip
    return tag("div", svg, class_="wide")


def _left(row: _Row, y: float, height: int) -> Markup:
    return tag("text", row.layer, x=LEFT - 6, y=y + height / 2, class_="end mid row")


def _written(rows: Sequence[_Row], experts: int, height: int) -> list[Markup]:
    """The figures themselves, where there is room."""
    if WIDTH / experts < READABLE or height < 14:
        return []
    return [
        tag(
            "text", decibels(sqnr), x=LEFT + (e + 0.5) * WIDTH / experts,
            y=HEAD + (i + 0.5) * height, class_="centre mid", fill=ink(PALETTE[index(sqnr)]),
        )
        for i, row in enumerate(rows)
        for e, sqnr in enumerate(row.cells)
        if sqnr is not None
    ]  # fmt: skip


def _experts(experts: int, y: float) -> list[Markup]:
    step = WIDTH / experts
    marks = [
        tag("text", str(at), x=LEFT + (at + 0.5) * step, y=y + 13, class_="centre")
        for at in ticks(0, experts - 1, 12)
    ]
    return [*marks, tag("text", "expert", x=LEFT + WIDTH / 2, y=y + 29, class_="centre soft")]


def _spread_axis(axis: Axis, tall: float) -> list[Markup]:
    start = LEFT + WIDTH + GAP
    parts = [
        tag("text", "lowest, layer and highest, dB", x=start, y=11, class_="soft"),
        tag("text", "expert apart", x=start + SPREAD + 10, y=11, class_="soft"),
    ]
    for at in ticks(axis.low, axis.high, 6):
        x = start + axis.at(at)
        parts += [
            tag("line", x1=x, x2=x, y1=HEAD - 4, y2=HEAD + tall, class_="grid"),
            tag("text", str(at), x=x, y=HEAD - 8, class_="centre"),
        ]
    return parts


def _spread(row: _Row, axis: Axis, y: float) -> Markup:
    """A line from the lowest to the highest expert, a mark at the layer's own figure."""
    start = LEFT + WIDTH + GAP
    if not row.finite:
        return tag("text", "exact", x=start + SPREAD, y=y, class_="end mid soft")
    low, high = min(row.finite.values()), max(row.finite.values())
    expert = min(row.finite, key=lambda i: (row.finite[i], i))
    parts = [
        tag("line", x1=start + axis.at(low), x2=start + axis.at(high), y1=y, y2=y, class_="span"),
    ]
    if math.isfinite(row.whole):
        x = start + axis.at(row.whole)
        parts.append(tag("line", x1=x, x2=x, y1=y - 3.5, y2=y + 3.5, class_="mark"))
    if low < sorted(row.finite.values())[len(row.finite) // 2] - APART:
        fill = hexadecimal(PALETTE[index(low)])
        told = f"{expert}: {decibels(low)}"
        parts += [
            tag("circle", cx=start + axis.at(low), cy=y, r=4, fill=fill, class_="dot"),
            tag("text", told, x=start + SPREAD + 10, y=y, class_="mid"),
        ]
    return tag("g", *parts)
