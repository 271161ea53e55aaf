"""What was measured, as rows: Markdown for people, JSON for a later comparison."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Run


@dataclass(frozen=True)
class Row:
    """One job done in one way: median time and CPU seconds, largest resident memory in bytes.

    ``bytes`` are those of the output, or of what is read where nothing is written; ``ratio`` is the
    time against ``cp`` and sync of them; ``bound`` what the memory had to stay under.
    """

    job: str
    how: str
    seconds: float
    cpu: float
    peak: int
    bytes: int | None = None
    ratio: float | None = None
    bound: int | None = None


@dataclass(frozen=True)
class Section:
    """The rows of one question; ``how`` heads the column that tells them apart."""

    name: str
    title: str
    how: str
    rows: tuple[Row, ...]


def median(
    job: str,
    how: str,
    runs: Sequence[Run],
    *,
    nbytes: int | None = None,
    ratios: Sequence[float] = (),
    bound: int | None = None,
) -> Row:
    """The row of some runs of the same thing; told on stderr, since the next one may take long."""
    row = Row(
        job,
        how,
        round(statistics.median(run.wall for run in runs), 3),
        round(statistics.median(run.cpu for run in runs), 3),
        max(run.peak for run in runs),
        nbytes,
        round(statistics.median(ratios), 2) if ratios else None,
        bound,
    )
    print(" ".join(("  ", *_cells(row, None))), file=sys.stderr, flush=True)
    return row


def markdown(sections: Sequence[Section], before: Mapping[str, Any], machine: Mapping[str, str],
             command: str) -> str:  # fmt: skip
    """A page of tables. ``before`` is an earlier result as JSON, or empty."""
    earlier = {
        (section["name"], row["job"], row["how"]): row
        for section in before.get("sections", ())
        for row in section["rows"]
    }
    parts = ["# What was measured", f"`{command}` on:", described(machine)]
    for section in sections:
        parts += [f"## {section.title}", table(section, earlier)]
    if before:
        parts += ["*Before* was measured on:", described(before["machine"])]
    return "\n\n".join(parts) + "\n"


def described(machine: Mapping[str, str]) -> str:
    """The machine in a line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


HEADS = ("job", "how", "GB", "time", "GB/s", "x `cp`+sync", "before", "CPU", "peak memory", "bound")
LEFT = ("job", "how")


def table(section: Section, earlier: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """Markdown; a column that no row fills is left out."""
    found = [_cells(row, earlier.get((section.name, row.job, row.how))) for row in section.rows]
    used = [n for n in range(len(HEADS)) if any(cells[n] for cells in found)]
    heads = [section.how if HEADS[n] == "how" else HEADS[n] for n in used]
    lines = [heads, ["---" if HEADS[n] in LEFT else "---:" for n in used]]
    lines += [[cells[n] for n in used] for cells in found]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, before: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A row's columns in the order of HEADS, empty where there is nothing to say."""
    gigabytes = None if row.bytes is None else row.bytes / 1e9
    was = "" if before is None else _compared(before)
    bound = ""
    if row.bound is not None:
        bound = f"{row.bound >> 20} MiB" + ("" if row.peak < row.bound else " **exceeded**")
    return (
        row.job,
        row.how,
        "" if gigabytes is None else f"{gigabytes:.1f}",
        f"{row.seconds:.2f} s",
        "" if gigabytes is None else f"{gigabytes / row.seconds:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        was,
        f"{row.cpu:.2f} s",
        f"{row.peak >> 20} MiB",
        bound,
    )


def _compared(before: Mapping[str, Any]) -> str:
    """The earlier figure that says most: the ratio if there is one, for disks differ by the day."""
    ratio = before["ratio"]
    return f"{before['seconds']:.2f} s" if ratio is None else f"{ratio:.2f} x"
