"""Bars within tables, and the histogram of scale exponents."""

from __future__ import annotations

import math
import re
from collections import Counter

from dsv4_quant.reports.figures import short
from dsv4_quant.reports.markup import Markup, join, tag
from dsv4_quant.reports.scales import Axis, ticks

LEFT, WIDTH, HEIGHT, HEAD, FOOT = 58, 980, 150, 22, 36
WIDEST = 42
NARROWEST = 240
UNEVEN = 100
"""From this ratio of the most to the fewest on, the axis is logarithmic."""

HALF = 0.5
"""Where a logarithmic axis of counts begins, so that one block is seen."""


def bar(value: float, most: float) -> Markup:
    """From zero; as wide as its cell if value is the most."""
    share = min(max(value / most, 0.0), 1.0) if most else 0.0
    width = 100 * (share if math.isfinite(share) else 1.0)
    strip = tag("rect", x=0, y=0, width=width, height=10, class_="bar")
    return tag("svg", strip, viewBox="0 0 100 10", preserveAspectRatio="none", class_="inline",
               aria_hidden="true")  # fmt: skip


def histogram(exponents: Counter[int], name: str) -> Markup:
    """Blocks by s, whose scale is 2**s; with the same as a table to fold out."""
    held = {s: count for s, count in sorted(exponents.items()) if count}
    low, high, most = min(held), max(held), max(held.values())
    is_log = most >= UNEVEN * min(held.values())
    step = min(WIDTH / (high - low + 1), WIDEST)
    start, width = LEFT, step * (high - low + 1)
    parts = [*_counts(most, width, is_log=is_log)]
    for s, count in held.items():
        tall = _tall(count, most, is_log=is_log)
        x = start + (s - low) * step
        parts.append(
            tag("rect", tag("title", f"2^{s}: {count:,} blocks"), x=x + step * 0.08,
                y=HEAD + HEIGHT - tall, width=step * 0.84, height=tall, class_="bar")
        )  # fmt: skip
        if step >= WIDEST * 0.85:
            parts.append(
                tag("text", short(count), x=x + step / 2, y=HEAD + HEIGHT - tall - 4,
                    class_="centre")
            )  # fmt: skip
    for s in ticks(low, high, 24):
        x = start + (s - low + 0.5) * step
        parts.append(tag("text", str(s), x=x, y=HEAD + HEIGHT + 13, class_="centre"))
    parts.append(
        tag("text", "s, the exponent of the scale 2^s", x=LEFT, y=HEAD + HEIGHT + 30,
            class_="soft")
    )  # fmt: skip
    kind = "logarithmic" if is_log else "linear"
    common = max(held, key=lambda s: (held[s], -s))
    said = (f"Histogram of scale exponents, {name}: from {low} to {high}, most blocks at {common};"
            f" {kind} axis")  # fmt: skip
    edge = max(math.ceil(LEFT + width + 10), NARROWEST)
    svg = tag("svg", *parts, viewBox=f"0 0 {edge} {HEAD + HEIGHT + FOOT}", width=edge,
              class_="histogram", role="img", aria_label=said)  # fmt: skip
    return join(tag("h3", f"{name}, {kind} axis"), svg, _table(held))


def _tall(count: float, most: int, *, is_log: bool) -> float:
    if not is_log:
        return Axis(0, most, HEIGHT).at(count)
    return Axis(math.log10(HALF), math.log10(most), HEIGHT).at(math.log10(count))


def _counts(most: int, width: float, *, is_log: bool) -> list[Markup]:
    marks = [10**i for i in range(len(str(most)))] if is_log else ticks(0, most, 4)
    marks = marks[:: -(-len(marks) // 6)]
    parts = []
    for count in marks:
        y = HEAD + HEIGHT - (_tall(count, most, is_log=is_log) if count else 0)
        parts += [
            tag("line", x1=LEFT, x2=LEFT + width, y1=y, y2=y, class_="grid"),
            tag("text", _bare(short(count)), x=LEFT - 6, y=y, class_="end mid"),
        ]
    title = tag("text", "blocks", x=LEFT - 6, y=HEAD - 10, class_="end soft")
    return [*parts, title]


def _bare(count: str) -> str:
    """``1M`` of ``1.00M``."""
    return re.sub(r"\.0+(?=\D)", "", count)


def _table(held: dict[int, int]) -> Markup:
    rows = [
        tag("tr", tag("td", str(s), class_="number"), tag("td", f"{count:,}", class_="number"))
        for s, count in held.items()
    ]
    head = tag("tr", tag("th", "s"), tag("th", "blocks"))
    return tag(
        "details",
        tag("summary", "as a table"),
        tag("table", tag("thead", head), tag("tbody", *rows), class_="exponents"),
    )
