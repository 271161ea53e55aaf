"""Convert, verify, digest and ``sha256sum`` against ``cp`` plus sync of the same bytes, in one run.

The checkpoint is synthetic, one layer of V4-Flash's widths with fewer experts and words, so that
it is about the size asked for. Each figure is a ratio to a ``cp`` that ran right before it, and
the median of the rounds; the plain PyTorch converter (tests/oracle) does the job in the published
way. Absolute times on a shared disk say little, ratios say enough.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.rows import Row, median
from benchmarks.timing import copy, dsv4, forget, remove, run, size_of, warm

ROOT = Path(__file__).parent.parent
FLASH = ROOT / "tests" / "configs" / "V4-Flash.json"
ORACLE = ROOT / "tests" / "oracle" / "published_converter.py"
BYTES_PER_EXPERT = 13_369_344


def checkpoint(folder: Path, gigabytes: float) -> Path:
    """A V4-Flash-shaped checkpoint of about that many GB: one layer, one vocabulary in eight.

    Half a GB is the least: what is not experts, and an expert for each of eight GPUs.
    """
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
    "reshard to 8 GPUs, B3SUMS": ["convert", "SRC", "OUT", "--gpus", "8", "--sums", "blake3"],
    "reshard, hf": ["convert", "SRC", "OUT", "--layout", "hf"],
    "FP4 to FP8, 8 GPUs": ["convert", "SRC", "OUT", "--gpus", "8", "--experts", "fp8"],
    "FP4 to BF16, hf": ["convert", "SRC", "OUT", "--layout", "hf", "--experts", "bf16"],
}
DSV4 = [sys.executable, "-m", "dsv4_quant"]
CHECKS: dict[str, list[str]] = {
    "verify --level checksums": [*DSV4, "verify", "SRC", "--level", "checksums", "--quiet"],
    "verify --level values": [*DSV4, "verify", "SRC", "--level", "values", "--quiet"],
    "digest": [*DSV4, "digest", "SRC", "--quiet"],
    "sha256sum": ["sh", "-c", 'find "$0" -type f -exec sha256sum {} +', "SRC"],
}


def measure(folder: Path, gigabytes: float, rounds: int, *, published: bool) -> list[Row]:
    """All jobs, cold and warm."""
    source = checkpoint(folder, gigabytes)
    rows = []
    for cache, prepare in (("cold", forget), ("warm", warm)):
        for job, arguments in JOBS.items():
            rows.append(_job(job, cache, arguments, source, folder, prepare, rounds))
        rows += _yardsticks(cache, source, folder, prepare, rounds)
    out = folder / "checked"
    dsv4("convert", str(source), str(out), "--gpus", "8", "--quiet")
    for job, command in CHECKS.items():
        rows.append(_check(job, command, out, folder, rounds))
    if published:
        rows += _published(source, folder)
    remove(source)
    remove(out)
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
    runs, ratios = [], []
    for _ in range(rounds):
        prepare(source)
        remove(out)
        runs.append(dsv4(*filled(arguments, source, out), "--quiet"))
        prepare(out)
        ratios.append(runs[-1].wall / copy(out, copied).wall)
        remove(copied)
    nbytes = size_of(out)
    remove(out)
    return median(job, cache, runs, nbytes=nbytes, ratios=ratios)


def _yardsticks(
    cache: str, source: Path, folder: Path, prepare: Callable[[Path], None], rounds: int
) -> Iterator[Row]:
    """``cp``, and a copy past the page cache that does nothing else."""
    copied, runs, least, ratios = folder / "copied", [], [], []
    for _ in range(rounds):
        prepare(source)
        runs.append(copy(source, copied))
        remove(copied)
        prepare(source)
        least.append(run([sys.executable, "-m", "benchmarks.copying", str(source), str(copied)]))
        remove(copied)
        ratios.append(least[-1].wall / runs[-1].wall)
    nbytes = size_of(source)
    yield median("cp and sync", cache, runs, nbytes=nbytes)
    yield median("copy past the page cache", cache, least, nbytes=nbytes, ratios=ratios)


def _check(job: str, command: list[str], source: Path, folder: Path, rounds: int) -> Row:
    """A job that writes nothing, against cp+sync of what it reads."""
    runs, ratios = [], []
    for _ in range(rounds):
        forget(source)
        runs.append(run(filled(command, source, folder)))
        forget(source)
        ratios.append(runs[-1].wall / copy(source, folder / "copied").wall)
        remove(folder / "copied")
    return median(job, "cold", runs, nbytes=size_of(source), ratios=ratios)


def _published(source: Path, folder: Path) -> list[Row]:
    """The published way, once: it takes long, and much memory."""
    rows = []
    for job, extra in (
        ("reshard to 8 GPUs", []),
        ("FP4 to FP8, 8 GPUs", ["--expert-dtype", "fp8"]),
    ):
        out = folder / "out"
        remove(out)
        warm(source)
        ours = run([sys.executable, str(ORACLE), str(source), str(out), "--ranks", "8", *extra])
        warm(out)
        ratio = ours.wall / copy(out, folder / "copied").wall
        rows.append(
            median(f"plain PyTorch: {job}", "warm", [ours], nbytes=size_of(out), ratios=[ratio])
        )
        remove(folder / "copied")
        remove(out)
    return rows


def filled(arguments: list[str], source: Path, out: Path) -> list[str]:
    """The arguments with SRC and OUT put in."""
    places = {"SRC": str(source), "OUT": str(out)}
    return [places.get(argument, argument) for argument in arguments]
