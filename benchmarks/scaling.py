"""Time and memory against the checkpoint's size, threads, and the memory that is allowed.

What should be seen: time is linear in bytes, memory is flat, and stays under ``--max-memory``.
Sources are cold, since large ones could not be anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.conversion import JOBS, checkpoint, filled
from benchmarks.plot import Line, Panel, svg
from benchmarks.rows import Row, median
from benchmarks.timing import Run, dsv4, forget, remove, size_of

SCALED = ("reshard to 8 GPUs", "FP4 to FP8, 8 GPUs")
THREADS = (1, 2)
BOUNDS = (256, 1024, 4096)
"""MiB."""


def measure_scaling(folder: Path, sizes: Sequence[float], rounds: int) -> list[Row]:
    """Every size in GB, with one and with two threads."""
    rows = []
    for gigabytes in sizes:
        source = checkpoint(folder, gigabytes)
        for job in SCALED:
            for threads in THREADS:
                how = f"{threads} thread{'s' if threads > 1 else ''}, {gigabytes:g} GB source"
                runs, nbytes = _runs(job, source, folder, rounds, "--workers", str(threads))
                rows.append(median(job, how, runs, nbytes=nbytes))
        remove(source)
    return rows


def measure_bounds(folder: Path, gigabytes: float) -> list[Row]:
    """The peak under every bound, once each: a bound must hold every time."""
    source = checkpoint(folder, gigabytes)
    rows = []
    for job in SCALED:
        for mebibytes in BOUNDS:
            how = f"{mebibytes}MiB"
            runs, nbytes = _runs(job, source, folder, 1, "--max-memory", how)
            rows.append(median(job, how, runs, nbytes=nbytes, bound=mebibytes << 20))
    remove(source)
    return rows


def _runs(
    job: str, source: Path, folder: Path, rounds: int, *options: str
) -> tuple[list[Run], int]:
    """The runs of a job from a cold source, and the bytes of its output."""
    out, runs, nbytes = folder / "out", [], 0
    for _ in range(rounds):
        forget(source)
        runs.append(dsv4(*filled(JOBS[job], source, out), *options, "--quiet"))
        nbytes = size_of(out)
        remove(out)
    return runs, nbytes


def plot(rows: Sequence[Row]) -> str:
    """Two panels as SVG: seconds and MiB against GB of output, a line per job and threads."""
    names = dict.fromkeys((row.job, row.how.split(",")[0]) for row in rows)
    lines = {
        name: [row for row in rows if (row.job, row.how.split(",")[0]) == name] for name in names
    }

    def points(panel: str) -> list[Line]:
        return [
            Line(
                ", ".join(name),
                [
                    ((row.bytes or 0) / 1e9, row.seconds if panel == "time" else row.peak / 2**20)
                    for row in held
                ],
            )
            for name, held in lines.items()
        ]

    return svg(
        [
            Panel("time", "GB of output", "seconds", points("time")),
            Panel("peak memory", "GB of output", "MiB", points("memory")),
        ]
    )
