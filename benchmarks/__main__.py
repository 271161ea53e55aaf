"""``python -m benchmarks [--size GB] [--rounds N] [--json FILE] [--against FILE]``."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.conversion import Row, measure
from benchmarks.timing import machine


def main() -> None:
    """Measures, prints a Markdown table, and writes JSON for a later comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=float, default=3.0, metavar="GB", help="default 3")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--folder", type=Path, help="where to work; needs 4 times the size")
    parser.add_argument("--no-published", action="store_true", help="leave out plain PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with that result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(
            Path(folder), options.size, options.rounds, published=not options.no_published
        )
    result = {"machine": machine(), "gigabytes": options.size, "rows": [asdict(r) for r in rows]}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    before = json.loads(options.against.read_text())["rows"] if options.against else []
    print(markdown(rows, before))
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))


def markdown(rows: list[Row], before: list[dict[str, object]]) -> str:
    """The table; with an earlier result, its ratios beside."""
    earlier = {(row["job"], row["cache"]): row["ratio"] for row in before}
    lines = [
        "| job | source | time | x `cp`+sync | CPU | peak memory |"
        + (" before |" if before else "")
    ]
    lines.append("|---|---|---:|---:|---:|---:|" + ("---:|" if before else ""))
    for row in rows:
        line = (
            f"| {row.job} | {row.cache} | {row.seconds:.1f} s | {row.ratio:.2f} |"
            f" {row.cpu:.1f} s | {row.peak / 2**20:.0f} MiB |"
        )
        lines.append(line + (f" {earlier.get((row.job, row.cache), '')} |" if before else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
