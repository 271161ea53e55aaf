"""A stranger recomputes the value digest from the definition in ``checkpoint/digest.py``.

Everything here is numpy, json and BLAKE3; the decoders are written from the formats' standards and
the digest from the five points of that docstring. Only then is the tool asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from tests.conversion.checkpoints import config, formats, write_checkpoint
from tests.folders import INDEX, Loose, edited_json, golden, read_file, write_file

Values = NDArray[Any]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)


def e4m3(code: NDArray[np.uint8]) -> Values:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = (code >> 3 & 15).astype(np.int64), (code & 7).astype(np.float64)
    normal, tiny = np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6)
    return np.where(code & 128, -1, 1) * np.where(exponent == 0, tiny, normal)


def e2m1(packed: NDArray[np.uint8]) -> Values:
    """Low nibble first; bit 3 is the sign."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.where(codes & 8, -1, 1) * E2M1[codes & 7]


def scale_values(dtype: str, data: bytes) -> Values:
    """E8M0 bytes are exponents with bias 127."""
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float64)
    return np.ldexp(1.0, np.frombuffer(data, np.uint8).astype(np.int64) - 127)


def decode(name: str, tensors: Loose) -> Values:
    """A weight's values: float32, or int64."""
    dtype, shape, data = tensors[name]
    if dtype == "I64":
        return np.frombuffer(data, "<i8").reshape(shape)
    if dtype == "F32":
        return np.frombuffer(data, "<f4").reshape(shape)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    held = np.frombuffer(data, np.uint8).reshape(shape)
    codes = e2m1(held) if dtype == "I8" else e4m3(held)
    form, (rows, cols), raw = tensors[name.removesuffix("weight") + "scale"]
    scales = scale_values(form, raw).reshape(rows, cols)
    b, c = (1, 32) if dtype == "I8" else (128, 128)
    spread = scales.repeat(b, 0).repeat(c, 1)[: codes.shape[0], : codes.shape[1]]
    return (codes * spread).astype("<f4")


def fp4_form(leaf: Values) -> bytes | None:
    """Point 3's first form: codes, then scales; None where it does not hold every value."""
    if leaf.shape[1] % 32 or not np.isfinite(leaf).all():
        return None
    blocks = leaf.astype(np.float64).reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    s = np.full(largest.shape, -127)
    while (grows := largest > np.ldexp(6.0, s)).any():
        s += grows
    s[largest == 0] = -126
    steps = np.ldexp(np.abs(blocks), -s)
    codes = np.searchsorted(E2M1, steps)
    if not (E2M1[codes] == steps).all():
        return None
    codes += 8 * (blocks < 0)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return bytes(packed.astype(np.uint8).tobytes() + (s + 127).astype(np.uint8).tobytes())


def leaves(values: Values) -> Iterator[tuple[int, bytes]]:
    """Points 2 and 3 of the definition: bits per value, and the bytes."""
    matrix = values.reshape(1, -1) if values.ndim == 1 else values
    p = 1
    while 2 * p * matrix.shape[1] <= 2**19:
        p *= 2
    for start in range(0, len(matrix), p):
        leaf = matrix[start : start + p]
        if leaf.dtype.kind == "i":
            yield 64, leaf.astype("<i8").tobytes()
            continue
        leaf = leaf.astype("<f4") + np.float32(0)  # -0 + 0 is +0
        fp4 = fp4_form(leaf)
        if fp4 is not None:
            yield 4, fp4
            continue
        bits = np.ascontiguousarray(leaf).view("<u4")
        is_exact = not (bits & 0xFFFF).any()
        yield (16, (bits >> 16).astype("<u2").tobytes()) if is_exact else (32, leaf.tobytes())


def tensor_digest(values: Values) -> str:
    """Point 4."""
    rows, cols = (1, len(values)) if values.ndim == 1 else values.shape
    text = f"dsv4-value-digest 2 tensor {rows}x{cols}\n".encode()
    for bits, content in leaves(values):
        text += bytes([bits]) + blake3(content).digest()
    return str(blake3(text).hexdigest())


def whole_digest(tensors: dict[str, str]) -> str:
    """Point 5."""
    lines = [f"{name} {tensors[name]}\n" for name in sorted(tensors)]
    return str(blake3("".join(["dsv4-value-digest 2 model\n", *lines]).encode()).hexdigest())


def recomputed(root: Path) -> dict[str, str]:
    """All digests of an hf checkpoint, as a stranger computes them."""
    tensors: Loose = {}
    for path in sorted(root.glob("*.safetensors")):
        tensors |= read_file(path)
    names = (name for name in tensors if not name.endswith(".scale"))
    return {name: tensor_digest(decode(name, tensors)) for name in names}


@cache
def of_golden(case: str) -> dict[str, str]:
    """The same for a golden checkpoint, once."""
    return recomputed(golden(case))


def ours(root: Path) -> dict[str, str]:
    """What the tool says."""
    with Checkpoint.open(root) as checkpoint:
        return digest_tensors(checkpoint, workers=2)


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_the_golden_checkpoints(case: str) -> None:
    expected = of_golden(case)
    assert ours(golden(case)) == expected
    assert model_digest(expected) == whole_digest(expected)


@pytest.mark.parametrize(("gpus", "experts"), [(2, "fp4"), (4, "fp8")])
def test_the_published_converters_rank_files(
    gpus: int, experts: str, ranks: Callable[[str, int, str], Path]
) -> None:
    """FP4 as F4 or requantised to FP8, wo_a as BF16, everything split: the same digests."""
    assert ours(ranks("tiny-fp4", gpus, experts)) == of_golden("tiny-fp4")


def to_fp8(packed: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    """FP4 codes to FP8 codes by hand: per 128x128 tile the scale 2**-6 times its largest."""
    values = e2m1(packed)
    rows, cols = values.shape
    tiles = scales.reshape(rows // 128, 128, cols // 128, 4)
    top = tiles.max(axis=(1, 3)) - 6
    steps = (tiles.astype(np.int64) - top[:, None, :, None]).reshape(rows, -1)
    wanted = np.ldexp(values, steps.repeat(32, 1))
    code_values = e4m3(np.arange(127, dtype=np.uint8))
    codes = np.searchsorted(code_values, np.abs(wanted)).astype(np.uint8)
    assert (code_values[codes] == np.abs(wanted)).all()
    return (codes | np.where(wanted < 0, 128, 0).astype(np.uint8)).tobytes(), top.tobytes()


def re_expressed(
    experts: str, tensors: Loose
) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    """The experts in another format, by hand; the rest as it is."""
    for name, (dtype, shape, data) in tensors.items():
        weight = name.replace(".scale", ".weight")
        if ".experts." not in name or ".shared" in name:
            yield name, (dtype, shape, data)
        elif experts == "bf16" and name == weight:
            bits = decode(name, tensors).view("<u4") >> 16
            yield name, ("BF16", [shape[0], 2 * shape[1]], bits.astype("<u2").tobytes())
        elif experts == "fp8" and name == weight:
            scale = name.replace(".weight", ".scale")
            raw = np.frombuffer(tensors[scale][2], np.uint8).reshape(tensors[scale][1])
            codes, top = to_fp8(np.frombuffer(data, np.uint8).reshape(shape), raw)
            rows, cols = shape[0], 2 * shape[1]
            yield name, ("F8_E4M3", [rows, cols], codes)
            yield scale, ("F8_E8M0", [rows // 128, cols // 128], top)


@pytest.mark.parametrize("experts", ["fp8", "bf16"])
def test_the_experts_re_expressed_by_hand(experts: str, tmp_path: Path) -> None:
    total, weight_map = 0, {}
    for path in sorted(golden("tiny-fp4").glob("*.safetensors")):
        tensors = dict(re_expressed(experts, read_file(path)))
        write_file(tmp_path / path.name, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(len(data) for _, _, data in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "config.json").write_bytes((golden("tiny-fp4") / "config.json").read_bytes())
    with edited_json(tmp_path / "config.json") as value:
        value["expert_dtype"] = experts
    assert ours(tmp_path) == of_golden("tiny-fp4")


def test_tensors_of_several_leaves_and_both_widths(tmp_path: Path) -> None:
    """A vocabulary of 9,000 makes leaves of 4,096 rows and a short one; some scales are no powers
    of two, so that some leaves need float32 and others do not."""

    def values(tensor: Any, rng: np.random.Generator) -> Values | None:
        if tensor.is_scale and tensor.dtype == "F32":
            scales = np.ldexp(1.0, rng.integers(-20, 20, tensor.shape)).astype(np.float32)
            scales.flat[-1] *= np.float32(1.1)
            return np.asarray(scales)
        return None

    raw = config(vocab_size=9000, q_lora_rank=1024, num_attention_heads=16, expert_dtype="fp8")
    write_checkpoint(tmp_path, raw, formats("fp8", scale="f32"), values=values)
    tensors = read_file(next(tmp_path.glob("*.safetensors")))
    wq_b = decode("layers.0.attn.wq_b.weight", tensors)
    assert [bits for bits, _ in leaves(wq_b)] == [16, 32]
    assert len(list(leaves(decode("embed.weight", tensors)))) == 3
    found = recomputed(tmp_path)
    assert ours(tmp_path) == found
    assert whole_digest(found) == model_digest(found)


def test_fp4_of_ragged_rows(tmp_path: Path) -> None:
    """Rows of 144 end within a block: such weights have no FP4 form, and need none."""

    def values(tensor: Any, rng: np.random.Generator) -> Values | None:
        if tensor.spec.format.kind == "fp4":
            low, high = (100, 140) if tensor.is_scale else (0, 256)
            return rng.integers(low, high, tensor.shape, np.uint8)
        return None

    write_checkpoint(tmp_path, config(moe_intermediate_size=144), values=values)
    found = recomputed(tmp_path)
    assert ours(tmp_path) == found
