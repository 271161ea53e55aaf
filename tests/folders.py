"""Checkpoint folders for tests: the golden ones, copies that can be damaged, files written by hand.

Nothing here uses the code under test: a file is 8 bytes of length, JSON, data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
INDEX = "model.safetensors.index.json"

Loose = dict[str, tuple[str, list[int], bytes]]
"""Tensors of one file: name -> (dtype, shape, bytes)."""


def golden(case: str) -> Path:
    """A golden checkpoint: ``tiny-fp4`` or ``tiny-base``."""
    return GOLDEN / case / "checkpoint"


def copy_of(case: str, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(golden(case), target))


def read_file(path: Path) -> Loose:
    """All tensors of a safetensors file, in the order of its header."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found: Loose = {}
    for name, entry in json.loads(raw[8:start]).items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], raw[start + begin : start + end])
    return found


def write_file(path: Path, tensors: Loose) -> None:
    """A safetensors file that holds these tensors in this order."""
    header, end = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        start, end = end, end + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    contents = (content for _, _, content in tensors.values())
    path.write_bytes(b"".join((len(text).to_bytes(8, "little"), text, *contents)))


@contextmanager
def edited_file(path: Path) -> Iterator[Loose]:
    """The tensors of a file, to be changed in place; written back at the end."""
    tensors = read_file(path)
    yield tensors
    write_file(path, tensors)


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's object, to be changed in place; written back at the end."""
    value = json.loads(path.read_bytes())
    yield value
    path.write_text(json.dumps(value, indent=2))


def shard_with(root: Path, tensor: str) -> Path:
    """The shard of an hf checkpoint that its index names for a tensor."""
    index = json.loads((root / INDEX).read_bytes())
    return root / str(index["weight_map"][tensor])
