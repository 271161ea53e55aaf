"""What requantising cost, for people at a terminal: the model in a line, the worst weights."""

from __future__ import annotations

from dsv4_quant.cli.tables import filled, table
from dsv4_quant.reports.figures import (
    decibels,
    magnitude,
    part,
    percent,
    relative_error,
    short,
)
from dsv4_quant.reports.recast import APART, Rows, apart, casts, model, worst

WORST = 10

LEGEND = (
    "dB: signal to quantisation noise, 3 more is half the noise; rms: the error's as a share of"
    " the values'; max: largest error; satur: values beyond the largest code; flush: values that"
    " became zero; exact: blocks of which no value changed"
)


def describe(rows: Rows) -> str:
    """The model's figures, the weights apart and the worst ten; fits 80 columns."""
    if not rows:
        return "requantised   nothing"
    lines = [_line(name, held) for name, held in casts(rows).items()]
    lines.append(_apart(rows))
    return "\n".join([*lines, "", worst_table(rows, WORST), "", filled(LEGEND, "")])


def worst_table(rows: Rows, count: int) -> str:
    """By SQNR, lowest first."""
    cells = [
        [
            row.name,
            decibels(row.cost.sqnr),
            percent(relative_error(row.cost)),
            f"{row.cost.largest_error:.2g}",  # 80 columns have no room for more
            short(row.cost.saturated),
            short(row.cost.flushed),
            _whole(row.cost.exact_share),
        ]
        for row in worst(rows, count)
    ]
    some = f"worst {len(cells)} of {len(rows):,}"
    return table([some, "dB", "rms", "max", "satur", "flush", "exact"], cells, "<>>>>>>")


def _line(name: str, rows: Rows) -> str:
    cost = model(rows)
    said = [
        f"{len(rows):,} weights {name}",
        "exact" if cost.error_squares == 0 else f"SQNR {decibels(cost.sqnr)} dB",
        f"rms error {percent(relative_error(cost))}",
        f"largest error {magnitude(cost.largest_error)}",
        _values("saturated", cost.saturated, cost.values),
        _values("flushed", cost.flushed, cost.values),
        f"{percent(cost.exact_share)} of the blocks exact",
    ]
    return filled(", ".join(said), "requantised   ")


def _values(what: str, count: int, of: int) -> str:
    return f"{what} {short(count)} values ({percent(part(count, of))})" if count else f"{what} none"


def _apart(rows: Rows) -> str:
    found = apart(rows)
    kind = f"more than {APART:g} dB below the median of its kind"
    if not found:
        return filled(f"none is {kind}", "apart         ")
    first = found[0]
    said = (
        f"{len(found):,} of {len(rows):,} weights, each {kind}; the worst, {first.row.name},"
        f" has {decibels(first.row.cost.sqnr)} dB, its kind {decibels(first.typical)}"
    )
    return filled(said, "apart         ")


def _whole(share: float) -> str:
    """In whole per cents, where only nothing is 0% and only all is 100%."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{100 * share:.0f}%"
