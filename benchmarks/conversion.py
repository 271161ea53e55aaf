"""Convert, verify and digest against ``cp`` plus sync of the same output bytes, in one run.

The checkpoint is synthetic, one layer of V4-Flash's widths with fewer experts and words, so that
it is about the size asked for. Each figure is a ratio to a ``cp`` that ran right before it, and
the median of the rounds; the plain PyTorch converter (tests/oracle) does the job in the published
way. Absolute times on a shared disk say little, ratios say enough.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Run, copy, dsv4, forget, run, warm

ROOT = Path(__file__).parent.parent
FLASH = ROOT / "tests" / "configs" / "V4-Flash.json"
ORACLE = ROOT / "tests" / "oracle" / "published_converter.py"
BYTES_PER_EXPERT = 13_369_344


@dataclass(frozen=True)
class Row:
    """One job: seconds, its ratio to cp+sync of its output, CPU seconds, peak memory."""

    job: str
    cache: str
    seconds: float
    ratio: float
    cpu: float
    peak: int


def checkpoint(folder: Path, gigabytes: float) -> Path:
    """A V4-Flash-shaped checkpoint of about that many GB: one layer, one vocabulary in eight."""
    config = json.loads(FLASH.read_text())
    config["vocab_size"] = 16160
    config["num_nextn_predict_layers"] = 0
    config["n_routed_experts"] = max(8, round((gigabytes - 0.4) * 1e9 / BYTES_PER_EXPERT / 8) * 8)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    source = folder / "source"
    dsv4("synth", str(source), "--config", str(path), "--layers", "1", "--quiet")
    return source


JOBS: dict[str, list[str]] = {
    "reshard to 1 GPU": ["convert", "SRC", "OUT", "--gpus", "1"],
    "reshard to 8 GPUs": ["convert", "SRC", "OUT", "--gpus", "8"],
    "reshard, hf": ["convert", "SRC", "OUT", "--layout", "hf"],
    "FP4 to FP8, 8 GPUs": ["convert", "SRC", "OUT", "--gpus", "8", "--experts", "fp8"],
    "FP4 to BF16, hf": ["convert", "SRC", "OUT", "--layout", "hf", "--experts", "bf16"],
}
CHECKS: dict[str, list[str]] = {
    "verify --level checksums": ["verify", "SRC", "--level", "checksums"],
    "verify --level values": ["verify", "SRC", "--level", "values"],
    "digest": ["digest", "SRC"],
}


def measure(folder: Path, gigabytes: float, rounds: int, *, published: bool) -> list[Row]:
    """All jobs, cold and warm."""
    source = checkpoint(folder, gigabytes)
    rows = []
    for cache, prepare in (("cold", forget), ("warm", warm)):
        for job, arguments in JOBS.items():
            rows.append(_job(job, cache, arguments, source, folder, prepare, rounds))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    out = folder / "checked"
    dsv4("convert", str(source), str(out), "--gpus", "8", "--quiet")
    for job, arguments in CHECKS.items():
        rows.append(_check(job, arguments, out, folder, rounds))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    if published:
        rows += _published(source, folder)
    return rows


def _job(
    job: str,
    cache: str,
    arguments: list[str],
    source: Path,
    folder: Path,
    prepare: Callable[[Path], None],
    rounds: int,
) -> Row:
    out, copied = folder / "out", folder / "copied"
    runs: list[tuple[Run, float]] = []
    for _ in range(rounds):
        prepare(source)
        _remove(out)
        ours = dsv4(*(_fill(a, source, out) for a in arguments), "--quiet")
        prepare(out)
        theirs = copy(out, copied)
        _remove(copied)
        runs.append((ours, ours.wall / theirs.wall))
    _remove(out)
    return _median(job, cache, runs)


def _check(job: str, arguments: list[str], source: Path, folder: Path, rounds: int) -> Row:
    """A job that writes nothing, against cp+sync of what it reads."""
    runs = []
    for _ in range(rounds):
        forget(source)
        ours = dsv4(*(_fill(a, source, folder) for a in arguments), "--quiet")
        forget(source)
        theirs = copy(source, folder / "copied")
        _remove(folder / "copied")
        runs.append((ours, ours.wall / theirs.wall))
    return _median(job, "cold", runs)


def _published(source: Path, folder: Path) -> list[Row]:
    """The published way, once: it takes long, and much memory."""
    rows = []
    for job, extra in (
        ("reshard to 8 GPUs", []),
        ("FP4 to FP8, 8 GPUs", ["--expert-dtype", "fp8"]),
    ):
        out = folder / "out"
        _remove(out)
        warm(source)
        ours = run([sys.executable, str(ORACLE), str(source), str(out), "--ranks", "8", *extra])
        warm(out)
        theirs = copy(out, folder / "copied")
        _remove(folder / "copied")
        _remove(out)
        row = _median(f"plain PyTorch: {job}", "warm", [(ours, ours.wall / theirs.wall)])
        print(_line(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _fill(argument: str, source: Path, out: Path) -> str:
    return {"SRC": str(source), "OUT": str(out)}.get(argument, argument)


def _median(job: str, cache: str, runs: list[tuple[Run, float]]) -> Row:
    return Row(
        job,
        cache,
        round(statistics.median(r.wall for r, _ in runs), 2),
        round(statistics.median(ratio for _, ratio in runs), 2),
        round(statistics.median(r.cpu for r, _ in runs), 2),
        max(r.peak for r, _ in runs),
    )


def _line(row: Row) -> str:
    return (
        f"{row.job:34} {row.cache:5} {row.seconds:7.2f} s  {row.ratio:5.2f} x cp"
        f"  {row.cpu:6.2f} s CPU  {row.peak / 2**20:6.0f} MiB"
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
