"""What V4-Pro's 145,116 tensors cost before a byte of them is read: a folder of true headers."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.conversion import ROOT
from benchmarks.rows import Row, median
from benchmarks.timing import dsv4, remove, run

PRO = ROOT / "tests" / "configs" / "V4-Pro.json"

PLANS: dict[str, Sequence[str]] = {
    "--help": ["--help"],
    "inspect": ["inspect", "SRC", "--quiet"],
    "inspect --gpus 16": ["inspect", "SRC", "--gpus", "16", "--quiet"],
    "verify --level structure": ["verify", "SRC", "--level", "structure", "--quiet"],
    "plan, 16 GPUs": ["convert", "SRC", "OUT", "--gpus", "16", "--dry-run", "--quiet"],
    "plan, 16 GPUs, FP8": [
        "convert", "SRC", "OUT", "--gpus", "16", "--experts", "fp8", "--dry-run", "--quiet"
    ],
    "plan, hf, FP8": [
        "convert", "SRC", "OUT", "--layout", "hf", "--experts", "fp8", "--dry-run", "--quiet"
    ],
}  # fmt: skip
FITS_OR_NOT = (0, 1)
"""A dry run ends with 1 where the disk is too small for 1.6 TB."""


def measure(folder: Path, rounds: int) -> list[Row]:
    """inspect, verify and the plans, then the manifest: made, written and read back."""
    source = folder / "pro"
    run([sys.executable, "-m", "benchmarks.sparse", str(source), str(PRO)], PYTHONPATH=str(ROOT))
    rows = []
    for job, arguments in PLANS.items():
        places = {"SRC": str(source), "OUT": str(folder / "out")}
        command = [places.get(argument, argument) for argument in arguments]
        runs = [dsv4(*command, allowed=FITS_OR_NOT) for _ in range(rounds)]
        rows.append(median(job, "", runs))
    child = [sys.executable, "-m", "benchmarks.planning", str(source), str(folder / "m.json")]
    runs = [run(child, PYTHONPATH=str(ROOT)) for _ in range(rounds)]
    rows.append(median("manifest, written and read back", "", runs))
    remove(source)
    return rows


def manifest(source: Path, out: Path) -> None:
    """Opens the checkpoint, makes a manifest with digests from names, writes it and reads it."""
    from dsv4_quant.checkpoint import Checkpoint
    from dsv4_quant.checkpoint.manifest import FileRecord, Manifest, TensorRecord, read_manifest

    def digest(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    with Checkpoint.open(source) as held:
        files = {
            name: FileRecord(header.data_start + header.data_bytes, digest(name))
            for name, header in held.folder.headers.items()
        }
        tensors = {
            name: TensorRecord(str(spec.format), digest(name)) for name, spec in held.specs.items()
        }
        made = Manifest("benchmark", held.layout, held.gpus, {}, files, tensors)
    began = time.monotonic()
    out.write_bytes(made.to_json())
    written = time.monotonic()
    assert read_manifest(out) == made
    print(f"written in {written - began:.2f} s, read in {time.monotonic() - written:.2f} s")


if __name__ == "__main__":
    manifest(Path(sys.argv[1]), Path(sys.argv[2]))
