"""Numbers as people read them: the same in the terminal and on the page."""

from __future__ import annotations

import math

from dsv4_quant.formats.cost import Cost


def relative_error(cost: Cost) -> float:
    """Root of the mean squared error as a part of the root mean square of the values."""
    if cost.error_squares == 0:
        return 0.0
    if cost.value_squares == 0:
        return math.inf
    return math.sqrt(cost.error_squares) / math.sqrt(cost.value_squares)


def decibels(value: float) -> str:
    """``19.31``; ``exact`` where there is no noise."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "exact" if value > 0 else "-inf"
    return f"{value:.2f}"


def percent(share: float) -> str:
    """Three digits: ``10.8%``. Only nothing is 0% and only all is 100%."""
    if not math.isfinite(share):
        return "NaN" if math.isnan(share) else "inf"
    value = 100 * share
    if 0 < value < 0.001:
        return "<0.001%"
    if 99.95 <= value < 100:
        return ">99.9%"
    digits = 0 if value >= 100 or value == 0 else 1 if value >= 9.995 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}%"


def magnitude(value: float) -> str:
    """Three digits or all before the point: ``0.0312``, ``1.20e-05``, ``12,345``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 99.95 <= abs(value) < 999_999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def short(count: int) -> str:
    """Three digits and a power of 1000, in five characters: ``9999``, ``83.5k``, ``1.70M``."""
    if count < 10_000:
        return str(count)
    value, unit = float(count), ""
    for larger in "kMGT":
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def part(count: int, of: int) -> float:
    """count / of; 0 of nothing."""
    return count / of if of else 0.0


def size(count: int) -> str:
    """Bytes with three digits: ``149 GiB``, ``512 B``."""
    power = max((count.bit_length() - 1) // 10, 0)
    value = count / 1024**power
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
