"""``python -m benchmarks``: all sections, or those named; about ten minutes as it is.

python -m benchmarks --size 3 --sizes 1 3 10 --json now.json --markdown benchmarks/RESULTS.md
python -m benchmarks planning --against before.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import conversion, planning, scaling
from benchmarks.rows import Row, Section, markdown
from benchmarks.timing import machine

Measure = Callable[[Path, argparse.Namespace], list[Row]]

SECTIONS: dict[str, tuple[str, str, Measure]] = {
    "planning": (
        "Planning V4-Pro: 145,116 tensors, 865 GB, from headers alone",
        "",
        lambda folder, options: planning.measure(folder, options.rounds),
    ),
    "memory": (
        "Peak memory under `--max-memory`",
        "--max-memory",
        lambda folder, options: scaling.measure_bounds(folder, options.size),
    ),
    "scaling": (
        "Time and memory against size and threads, cold source",
        "threads, size",
        lambda folder, options: scaling.measure_scaling(folder, options.sizes, 1),
    ),
    "conversion": (
        "Against `cp` and sync of the same bytes",
        "source",
        lambda folder, options: conversion.measure(
            folder, options.size, options.rounds, published=not options.no_published
        ),
    ),
}
"""Name -> title, head of the column that tells a job's rows apart, and what measures it."""


def main() -> None:
    """Measures, prints Markdown tables, and writes what was asked for."""
    options = parser().parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser().error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    before = json.loads(options.against.read_text()) if options.against else {}
    sections = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.sections or SECTIONS:
            title, how, measure = SECTIONS[name]
            print(title, file=sys.stderr, flush=True)
            sections.append(Section(name, title, how, tuple(measure(Path(folder), options))))
    page = markdown(sections, before, machine(), command(sys.argv[1:]))
    print(page, end="")
    result = {"machine": machine(), "sections": [asdict(section) for section in sections]}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(page)
    for section in sections:
        if options.plot and section.name == "scaling":
            options.plot.write_text(scaling.plot(section.rows))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    made.add_argument("--size", type=float, default=2.0, metavar="GB", help="default 2")
    made.add_argument("--sizes", type=float, nargs="+", default=[1.0, 2.0, 4.0], metavar="GB",
                      help="of scaling; default 1 2 4")  # fmt: skip
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    made.add_argument("--folder", type=Path, help="where to work; needs 10 times the size")
    made.add_argument("--no-published", action="store_true", help="leave out plain PyTorch")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write scaling as SVG")
    made.add_argument("--against", type=Path, metavar="FILE", help="compare with that --json")
    return made


def command(arguments: list[str]) -> str:
    """How to repeat it; where it worked and wrote is nobody's business."""
    options = parser().parse_args(arguments)
    words: list[Any] = ["python -m benchmarks", *options.sections, "--size", f"{options.size:g}"]
    words += ["--sizes", *(f"{size:g}" for size in options.sizes), "--rounds", options.rounds]
    words += ["--no-published"] if options.no_published else []
    return " ".join(map(str, words))


if __name__ == "__main__":
    main()
