"""Small random checkpoints of any shape, with values as wild as their formats allow.

Names and shapes come from the catalogue; values and files are made here, with numpy alone. FP4
scales spread over 2^14 inside a tile and reach from the smallest to the largest byte, blocks of
zeros (either sign) hold any scale, FP8 codes are all but NaN, vectors hold any finite number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_quant.catalogue import Catalogue, Formats, StoredTensor
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.config import parse_config
from dsv4_quant.formats.blocks import BF16, FP4, Format, ScaleKind, fp8
from tests.folders import INDEX, Loose, golden, write_file

TILE, GROUP = 128, 32

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "o_groups": 2,
    "o_lora_rank": 128,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "n_routed_experts": 4,
    "num_hidden_layers": 2,
    "compress_ratios": [4, 128, 0],
    "vocab_size": 256,
}
"""The golden config cut down: two layers, one mtp block, four experts."""


def config(**changes: Any) -> dict[str, Any]:
    """The golden config with some keys changed; None removes a key."""
    raw = json.loads((golden("tiny-fp4") / "config.json").read_bytes()) | SMALL | changes
    return {key: value for key, value in raw.items() if value is not None}


def formats(
    experts: str = "fp4", dense: str = "fp8", scale: ScaleKind = "e8m0", wo_a: str | None = None
) -> Formats:
    """Formats by their names; blocks are 128x128."""
    forms: dict[str, Format] = {"fp4": FP4, "fp8": fp8((TILE, TILE), scale), "bf16": BF16}
    return Formats(forms[experts], forms[dense], forms[wo_a or dense])


def write_checkpoint(
    root: Path,
    raw: dict[str, Any],
    forms: Formats | None = None,
    *,
    seed: int = 0,
    shard: Callable[[StoredTensor], int] = lambda tensor: 0,
    values: Callable[[StoredTensor, np.random.Generator], NDArray[Any] | None] | None = None,
) -> Path:
    """Writes an hf checkpoint; ``values`` may make a tensor's array, or leave it to this module."""
    catalogue = Catalogue(parse_config(raw), forms or formats())
    files: dict[int, Loose] = {}
    for tensor in catalogue.stored("hf"):
        rng = np.random.default_rng([seed, *tensor.name.encode()])
        made = values(tensor, rng) if values else None
        data = (wild(tensor, rng) if made is None else made).tobytes()
        assert len(data) == tensor.nbytes
        loose = files.setdefault(shard(tensor), {})
        loose[tensor.name] = (tensor.dtype, list(tensor.shape), data)
    root.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, (_, loose) in enumerate(sorted(files.items()), 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(root / name, loose)
        weight_map |= dict.fromkeys(loose, name)
    total = sum(len(data) for loose in files.values() for _, _, data in loose.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / INDEX).write_text(json.dumps(index, indent=2))
    (root / "config.json").write_text(json.dumps(raw, indent=2))
    return root


def write_hollow(root: Path, raw: dict[str, Any], forms: Formats | None = None) -> Path:
    """A checkpoint in one file whose data are a hole: zeros that take no room on the disk."""
    header, end = {}, 0
    for tensor in Catalogue(parse_config(raw), forms or formats()).stored("hf"):
        offsets = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (root / "config.json").write_text(json.dumps(raw))
    return root


def wild(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any]:
    """Values of every kind that no exact conversion may refuse."""
    rows, cols = tensor.spec.matrix
    if tensor.dtype == "I64":
        ids = [rng.permutation(4)[: tensor.shape[1]] for _ in range(rows)]
        return np.array(ids, np.int64)
    if tensor.is_scale:
        if tensor.spec.format.kind == "fp4":
            return fp4_scales(rows, cols, rng)
        exponents = rng.integers(3, 247, tensor.shape)
        if tensor.dtype == "F8_E8M0":
            return exponents.astype(np.uint8)
        return np.ldexp(1.0, exponents - 127).astype(np.float32)
    if tensor.dtype == "I8":
        return fp4_codes(rows, cols, rng)
    if tensor.dtype == "F8_E4M3":
        codes = rng.integers(0, 256, tensor.shape).astype(np.uint8)
        return np.where(codes & 0x7F == 0x7F, 0x80, codes)
    if tensor.dtype == "BF16":
        bits = rng.integers(0, 1 << 16, tensor.shape).astype(np.uint16)
        return np.where(bits & 0x7F80 == 0x7F80, 0x8000, bits).astype(np.uint16)
    return rng.standard_normal(tensor.shape).astype(np.float32)


def is_zero_block(rows: int, cols: int) -> NDArray[np.bool_]:
    """Which 1x32 blocks of an FP4 weight hold only zeros: about one in eight, always the same."""
    return np.random.default_rng(rows * cols).integers(0, 8, (rows, cols // GROUP)) == 0


def fp4_codes(rows: int, cols: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Packed codes, all sixteen, with blocks of +0 and -0."""
    codes = rng.integers(0, 16, (rows, cols))
    zeros = is_zero_block(rows, cols).repeat(GROUP, axis=1)
    codes = np.where(zeros, codes & 8, codes)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


def fp4_scales(rows: int, cols: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Per tile a largest byte, the extremes among them, and 0 to 14 below it; zero blocks any."""
    tiles = -(-rows // TILE), -(-cols // TILE)
    top = rng.choice([6, 13, 20, 100, 127, 240, 252, 253, 254], tiles)
    top = top.repeat(TILE, 0)[:rows].repeat(TILE // GROUP, 1)[:, : cols // GROUP]
    bytes_ = np.maximum(top - rng.integers(0, 15, top.shape), 0)
    low = (rng.random(top.shape) * (top + 1)).astype(np.int64)
    return np.where(is_zero_block(rows, cols), low, bytes_).astype(np.uint8)


def tree(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, hidden ones too, by its path inside."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }


def digests(root: Path) -> dict[str, str]:
    """The value digest of every weight."""
    with Checkpoint.open(root) as checkpoint:
        return digest_tensors(checkpoint, workers=2)


def whole_digest(root: Path) -> str:
    """The model's value digest."""
    return model_digest(digests(root))
