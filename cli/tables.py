"""Plain aligned tables, byte sizes and durations."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

GAP = "  "
NARROWEST = 8


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Rows under a header, as wide as the terminal at most.

    ``align`` has one letter per column: ``<`` for text, ``>`` for numbers. What is too wide is
    taken from the widest column of text, whose long entries then end in an ellipsis.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    limit = shutil.get_terminal_size((80, 24)).columns
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - limit
    texts = [i for i, letter in enumerate(align) if letter == "<"]
    if excess > 0 and texts:
        widest = max(texts, key=lambda i: widths[i])
        widths[widest] = max(NARROWEST, widths[widest] - excess)
    return "\n".join(
        GAP.join(
            f"{_clipped(cell, width):{letter}{width}}"
            for cell, width, letter in zip(line, widths, align, strict=True)
        ).rstrip()
        for line in lines
    )


def _clipped(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def filled(text: str, first: str = "") -> str:
    """As many lines as it takes, up to 100 columns; ``first`` stands before the first, and as much
    room before the others. Names and paths stay whole."""
    width = max(min(shutil.get_terminal_size((80, 24)).columns, 100), 40)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def size(count: float) -> str:
    """Bytes with three significant digits: ``805 GiB``, ``1.46 TiB``, ``512 B``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 999.5:  # 1010 MiB would be a fourth digit
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{value:.0f} B"
    digits = next((d for d, end in ((3, 0.9995), (2, 9.995), (1, 99.95)) if abs(value) < end), 0)
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short(seconds: float) -> str:
    """``0.4 s``; from ten seconds on a duration."""
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)
