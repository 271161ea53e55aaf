"""Line plots as SVG, from zero, with a legend: enough for two panels on a page, and no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 260
LEFT, TOP, RIGHT, BOTTOM = 58, 34, 14, 44
"""Margins of a panel's axes."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""

LEGEND_ROW = 18

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A name for the legend, and (x, y) from left to right; no value is negative."""

    name: str
    points: Points


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side; equal names have equal colours, and one legend below."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    width, height = WIDTH * len(panels), HEIGHT + LEGEND_ROW * len(names) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, panel in enumerate(panels):
        parts += [f'<g transform="translate({WIDTH * place} 0)">', *_panel(panel, colours), "</g>"]
    for row, (name, colour) in enumerate(colours.items()):
        y = HEIGHT + LEGEND_ROW * row + 8
        parts.append(f'<path d="M{LEFT} {y}h24" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 32}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colours: dict[str, str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    xs, ys = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / xs[-1], y / ys[-1]
        return round(LEFT + across * (right - LEFT), 1), round(bottom - up * (bottom - TOP), 1)

    parts = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold">{escape(panel.title)}</text>']
    for y in ys:
        _, height = at(0, y)
        parts.append(f'<path d="M{LEFT} {height}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4}" text-anchor="end">{y:g}</text>')
    for x in xs:
        across, _ = at(x, 0)
        parts.append(f'<text x="{across}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(panel.x)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)"'
        f' text-anchor="middle">{escape(panel.y)}</text>'
    )
    for line in panel.lines:
        places = [at(*point) for point in line.points]
        path = "L".join(f"{x} {y}" for x, y in places)
        colour = colours[line.name]
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def ticks(largest: float) -> list[float]:
    """From 0 to ``largest`` or beyond, in a few steps of 1, 2 or 5 times a power of ten."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(power * part for part in (1, 2, 5, 10) if largest / (power * part) <= 7)
    return [round(step * count, 10) for count in range(math.ceil(largest / step - 1e-9) + 1)]
