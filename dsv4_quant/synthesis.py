"""Seeded random checkpoints in the published on-disk format, tiny or real-shaped.

Names, dtypes, shapes, shards, header order, index and config are those of a published checkpoint,
so everything that works on one can be tried on the other. The same arguments give the same bytes
on every machine (``synth_values`` says why).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsv4_quant.catalogue import Catalogue, StoredTensor, shard_of
from dsv4_quant.checkpoint.folder import INDEX
from dsv4_quant.checkpoint.header import build_header
from dsv4_quant.checkpoint.placement import geometry
from dsv4_quant.errors import UsageError
from dsv4_quant.progress import NoProgress, Progress
from dsv4_quant.synth_config import Experts, synthetic_catalogue
from dsv4_quant.synth_folder import NewFolder, write_all
from dsv4_quant.synth_values import generate

PANEL_BYTES = 4 << 20
"""What one thread makes and writes at a time."""

MAX_THREADS = 4

GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
}


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was written: tensors (scales count), bytes of tensor data, formats."""

    path: str
    shards: int
    tensors: int
    bytes: int
    experts: str
    dense: str
    seed: int


def synth(
    out: str | Path,
    *,
    config: str | Path = "tiny",
    experts: Experts | None = None,
    layers: int | None = None,
    seed: int = 0,
    shards: int | None = None,
    progress: Progress | None = None,
) -> SynthReport:
    """Writes a random checkpoint into a new or empty folder.

    Args:
        out: the folder.
        config: ``tiny`` (FP4 experts), ``tiny-base`` (FP8 experts, every scale F32), or the path
            of a published config.json.
        experts: another format for the experts than the config's.
        layers: only the model's first layers (its mtp blocks stay).
        seed: any integer; another seed gives other values.
        shards: that many files instead of one per layer.
        progress: told how far the work is.

    Raises UsageError, ConfigError, DiskSpaceError or WriteError. After an error or an interrupt
    nothing that was written is left.
    """
    catalogue, config_bytes = synthetic_catalogue(config, experts, layers)
    content = list(_shards(catalogue, shards))
    total = sum(tensor.nbytes for tensors in content for tensor in tensors)
    root = Path(out)
    with NewFolder(root, total) as output:
        progress = progress or NoProgress()
        progress.stage("synthesising")
        progress.total(total)
        output.write("generation_config.json", _json(GENERATION_CONFIG))
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(content, 1):
            name = f"model-{number:05d}-of-{len(content):05d}.safetensors"
            for done in _write_shard(output.begin(name), tensors, seed, catalogue):
                progress.advance(done)
            output.finish(name)
            weight_map |= {tensor.name: name for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        output.write(INDEX, _json(index))
        output.write("config.json", config_bytes)
    formats = catalogue.formats
    return SynthReport(
        path=str(out),
        shards=len(content),
        tensors=len(weight_map),
        bytes=total,
        experts=str(formats.experts),
        dense=str(formats.dense),
        seed=seed,
    )


def _shards(catalogue: Catalogue, count: int | None) -> Iterator[list[StoredTensor]]:
    """The tensors of every file: the published parts, or runs of them as equal as can be."""
    parts: dict[int, list[StoredTensor]] = {}
    for tensor in catalogue.stored("hf"):
        parts.setdefault(shard_of(tensor.spec, catalogue.config), []).append(tensor)
    if count is not None and not 1 <= count <= len(parts):
        raise UsageError(
            f"This model cannot be put into {count} shards",
            hint=f"A layer is never cut in two: give 1 to {len(parts)}.",
        )
    wanted = count or len(parts)
    for shard in range(wanted):
        first, last = (-(-len(parts) * n // wanted) for n in (shard, shard + 1))
        yield [tensor for part in range(first, last) for tensor in parts[part]]


def _write_shard(
    path: Path, tensors: list[StoredTensor], seed: int, catalogue: Catalogue
) -> Iterator[int]:
    """Makes and writes a file's tensors on a few threads; yields bytes as they are done."""
    header, entries = build_header((t.name, t.dtype, t.shape) for t in tensors)
    experts = catalogue.config.n_routed_experts
    with path.open("wb") as file, ThreadPoolExecutor(_threads()) as pool:
        file.write(header)
        file.flush()

        def write(panel: tuple[StoredTensor, int, int]) -> int:
            tensor, start, stop = panel
            data = generate(tensor, seed, experts, start, stop).data
            write_all(file.fileno(), data, len(header) + entries[tensor.name].start + start)
            return stop - start

        yield from pool.map(write, _panels(tensors))
        os.fsync(file.fileno())


def _threads() -> int:
    return min(os.cpu_count() or 1, MAX_THREADS)


def _panels(tensors: list[StoredTensor]) -> Iterator[tuple[StoredTensor, int, int]]:
    """Whole rows of a tensor, a few MiB each: (tensor, first byte, byte after the last)."""
    for tensor in tensors:
        rows, row_bytes = geometry(tensor)
        step = max(1, PANEL_BYTES // row_bytes)
        for row in range(0, rows, step):
            yield tensor, row * row_bytes, min(row + step, rows) * row_bytes


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()
