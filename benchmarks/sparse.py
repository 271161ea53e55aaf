"""A checkpoint of any size that takes no room: true headers, index and config over holes.

What reads headers only (inspect, the structure level of verify, planning) cannot tell it from the
published one. Read as data, it is all zeros.

    python -m benchmarks.sparse FOLDER CONFIG.json
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from dsv4_quant.catalogue import (
    Catalogue,
    StoredTensor,
    published_formats,
    shard_count,
    shard_of,
)
from dsv4_quant.checkpoint.folder import INDEX
from dsv4_quant.checkpoint.header import build_header
from dsv4_quant.config import read_config


def sparse(folder: Path, config: Path) -> int:
    """Writes the hf checkpoint that a published config.json describes; returns its data bytes."""
    parsed = read_config(config)
    catalogue = Catalogue(parsed, published_formats(parsed))
    content: dict[int, list[StoredTensor]] = {}
    for tensor in catalogue.stored("hf"):
        content.setdefault(shard_of(tensor.spec, parsed), []).append(tensor)
    folder.mkdir(parents=True)
    shutil.copyfile(config, folder / "config.json")
    where, total = {}, 0
    for shard, tensors in sorted(content.items()):
        name = f"model-{shard + 1:05d}-of-{shard_count(parsed):05d}.safetensors"
        header, _ = build_header((t.name, t.dtype, t.shape) for t in tensors)
        held = sum(tensor.nbytes for tensor in tensors)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + held)
        where |= {tensor.name: name for tensor in tensors}
        total += held
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return total


if __name__ == "__main__":
    sparse(Path(sys.argv[1]), Path(sys.argv[2]))
