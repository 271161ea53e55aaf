"""Every kind of damage that the published table promises something about.

A damage is done to a copy of a sound checkpoint, in place, by editing bytes, JSON or whole files;
nothing of the code under test is used for it. What must be found, at which level and under which
name, stands beside it: the test compares, it does not record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.folders import INDEX, edited_file, edited_json, golden, shard_with

Level = Literal["structure", "checksums", "values"]
Source = Literal["fp4", "base", "mp"]

EXPERT = "layers.1.ffn.experts.3"
W1 = f"{EXPERT}.w1.weight"
WO_A = "layers.1.attn.wo_a.weight"
NORM = "layers.1.attn_norm.weight"
SINK = "layers.1.attn.attn_sink"
IDS = "layers.0.ffn.gate.tid2eid"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@dataclass(frozen=True)
class Damage:
    """What is done, and what must be said of it.

    bare: the first level that finds it in a folder without a manifest; None: none does, or the
    damage is to the manifest itself.
    pinned: the same where manifest and SHA256SUMS were made before the damage.
    against: what the comparison with the undamaged checkpoint must name: weights, files, both or
    nothing. named: one tensor or file that the first finding level must name.
    """

    kind: str
    do: Callable[[Path], None]
    bare: Level | None
    pinned: Level | None
    named: str
    against: tuple[str, ...] = ()
    source: Source = "fp4"


@contextmanager
def stored(root: Path, tensor: str, file: str | None = None) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a stored tensor, to be changed in place; nothing else of the file changes."""
    path = root / file if file else shard_with(root, tensor)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])[tensor]["data_offsets"]
    data = np.frombuffer(raw[start + begin : start + end], np.uint8).copy()
    yield data
    raw[start + begin : start + end] = data.tobytes()
    path.write_bytes(raw)


def set_bytes(
    tensor: str, at: int, *values: int, file: str | None = None
) -> Callable[[Path], None]:
    """Overwrites bytes of a tensor; a negative value flips the bits of its absolute value."""

    def do(root: Path) -> None:
        with stored(root, tensor, file) as data:
            for place, value in enumerate(values, at):
                data[place] = value if value >= 0 else data[place] ^ -value

    return do


def fill(tensor: str, begin: int, end: int, value: int) -> Callable[[Path], None]:
    """Overwrites a stretch of a tensor's bytes."""

    def do(root: Path) -> None:
        with stored(root, tensor) as data:
            data[begin:end] = value

    return do


def apply_to(tensor: str, change: Callable[[NDArray[np.uint8]], Any]) -> Callable[[Path], None]:
    """Replaces a tensor's bytes by a function of them."""

    def do(root: Path) -> None:
        with stored(root, tensor) as data:
            data[:] = change(data.copy())

    return do


def swap(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Exchanges the bytes of tensors of the same size in one shard."""

    def do(root: Path) -> None:
        for one, other in pairs:
            with edited_file(shard_with(root, one)) as tensors:
                (*form, left), (_, _, right) = tensors[one], tensors[other]
                tensors[one], tensors[other] = (*form, right), (*form, left)

    return do


def parts(expert: str) -> list[str]:
    """The six stored tensors of an expert."""
    return [f"{expert}.{w}.{part}" for w in ("w1", "w2", "w3") for part in ("weight", "scale")]


def weights(*experts: str) -> tuple[str, ...]:
    """The three weights of each expert."""
    return tuple(f"{expert}.{w}.weight" for expert in experts for w in ("w1", "w2", "w3"))


def shift_experts(root: Path) -> None:
    """Every expert of layer 1 holds its neighbour's weights, the last one the first one's."""
    names = [f"layers.1.ffn.experts.{number}" for number in range(8)]
    with edited_file(shard_with(root, parts(names[0])[0])) as tensors:
        held = {name: tensors[name] for expert in names for name in parts(expert)}
        for mine, theirs in zip(names, names[1:] + names[:1], strict=True):
            for one, other in zip(parts(mine), parts(theirs), strict=True):
                tensors[one] = held[other]


def number_from_one(root: Path) -> None:
    """The experts of layer 1 are called 1 to 8."""
    for number in reversed(range(8)):
        for part in parts(f"layers.1.ffn.experts.{number}"):
            rename(part, part.replace(f"experts.{number}", f"experts.{number + 1}"))(root)


def rename(old: str, new: str) -> Callable[[Path], None]:
    """A tensor under another name, in its shard and in the index."""

    def do(root: Path) -> None:
        shard = shard_with(root, old)
        with edited_file(shard) as tensors:
            tensors[new] = tensors.pop(old)
        with edited_json(root / INDEX) as index:
            del index["weight_map"][old]
            index["weight_map"][new] = shard.name

    return do


def lose(tensor: str) -> Callable[[Path], None]:
    """A tensor that is gone without a trace: from its shard, the index and total_size."""

    def do(root: Path) -> None:
        with edited_file(shard_with(root, tensor)) as tensors:
            size = len(tensors.pop(tensor)[2])
        with edited_json(root / INDEX) as index:
            del index["weight_map"][tensor]
            index["metadata"]["total_size"] -= size

    return do


def header(tensor: str, **fields: Any) -> Callable[[Path], None]:
    """A lie in a header entry, the data untouched."""

    def do(root: Path) -> None:
        path = shard_with(root, tensor)
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:start])
        entries[tensor] |= fields
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])

    return do


def overlap(root: Path) -> None:
    """A tensor's offsets point at the data of the one before it."""
    path = shard_with(root, NORM)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    end = entries[NORM]["data_offsets"][0]
    before = next(name for name, entry in entries.items() if entry["data_offsets"][1] == end)
    entries[NORM]["data_offsets"] = entries[before]["data_offsets"]
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


def resize(file: str, change: int) -> Callable[[Path], None]:
    """A file that lost its last bytes, or got some more."""

    def do(root: Path) -> None:
        path = root / file
        raw = path.read_bytes()
        path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))

    return do


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edited index."""

    def do(root: Path) -> None:
        with edited_json(root / INDEX) as value:
            change(value)

    return do


def delete(file: str) -> Callable[[Path], None]:
    """A file that is gone."""
    return lambda root: (root / file).unlink()


def write(file: str, text: str) -> Callable[[Path], None]:
    """A file with other contents, or one more."""

    def do(root: Path) -> None:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)

    return do


def stale(root: Path) -> None:
    """A shard of another revision: the same names, shapes and sizes, other FP4 codes."""
    with edited_file(root / SHARDS[1]) as tensors:
        for name, (dtype, shape, data) in tensors.items():
            if dtype == "I8":
                tensors[name] = dtype, shape, data[::-1]


def stale_weights(root: Path) -> tuple[str, ...]:
    """The weights that ``stale`` changes."""
    held = json.loads((root / INDEX).read_bytes())["weight_map"]
    return tuple(
        name for name, file in held.items()
        if file == SHARDS[1] and ".experts." in name and name.endswith(".weight")
    )  # fmt: skip


def hold_twice(root: Path) -> None:
    """A tensor that a second shard holds, too."""
    with edited_file(root / SHARDS[2]) as tensors, edited_file(shard_with(root, NORM)) as others:
        tensors[NORM] = others[NORM]


def requantise(codes: int, scale: int) -> Callable[[Path], None]:
    """An FP4 weight whose codes all lie in a part of the range; its scales make up for it."""

    def do(root: Path) -> None:
        with stored(root, W1) as data:
            data[:] = data & codes
        with stored(root, W1.replace("weight", "scale")) as data:
            data += np.uint8(scale)

    return do


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A manifest in which somebody changed something."""

    def do(root: Path) -> None:
        path = root / "dsv4-manifest.json"
        if path.exists():
            value = json.loads(path.read_bytes())
            change(value)
            path.write_text(json.dumps(value))

    return do


def edit_sums(root: Path) -> None:
    """SHA256SUMS with another hash for a shard."""
    path = root / "SHA256SUMS"
    if path.exists():
        lines = path.read_text().splitlines()
        path.write_text("\n".join("0" * 64 + line[64:] if SHARDS[0] in line else line
                                  for line in lines) + "\n")  # fmt: skip


def swap_ranks(root: Path) -> None:
    """The two rank files under each other's names."""
    (root / "model0-mp2.safetensors").rename(root / "spare")
    (root / "model1-mp2.safetensors").rename(root / "model0-mp2.safetensors")
    (root / "spare").rename(root / "model1-mp2.safetensors")


def swap_halves(root: Path) -> None:
    """The two ranks' halves of a split weight, exchanged."""
    name, (one, other) = (
        "layers.1.attn.wq_b.weight",
        (root / f"model{r}-mp2.safetensors" for r in "01"),
    )
    with edited_file(one) as left, edited_file(other) as right:
        left[name], right[name] = right[name], left[name]


def link_out(root: Path) -> None:
    """A shard that is a link to a file outside the folder."""
    outside = root.parent / f"{root.name}-outside"
    (root / SHARDS[1]).replace(outside)
    (root / SHARDS[1]).symlink_to(outside)


VALUES = [
    Damage("one bit of an FP4 code", set_bytes(W1, 1000, -0x10), None, "checksums", W1, (W1,)),
    Damage("one bit of an FP8 code", set_bytes(WO_A, 777, -0x20), None, "checksums", WO_A, (WO_A,)),
    Damage("an FP8 code that is NaN", set_bytes(WO_A, 300, 0x7F), "values", "checksums", WO_A,
           (WO_A,)),
    Damage("the lowest bit of a norm (BF16)", set_bytes(NORM, 20, -0x01), None, "checksums", NORM,
           (NORM,)),
    Damage("the highest exponent bit of a norm", set_bytes(NORM, 20, 0x66, 0x7F), "values",
           "checksums", NORM, (NORM,)),
    Damage("NaN in the embedding", set_bytes("embed.weight", 4000, 0xC0, 0x7F), "values",
           "checksums", "embed.weight", ("embed.weight",)),
    Damage("the lowest bit of an F32 tensor", set_bytes(SINK, 8, -0x01), None, "checksums", SINK,
           (SINK,)),
    Damage("infinity in an F32 tensor", set_bytes(SINK, 8, 0, 0, 0x80, 0x7F), "values",
           "checksums", SINK, (SINK,)),
    Damage("a scale byte that is 0xFF", set_bytes(f"{EXPERT}.w1.scale", 17, 0xFF), "values",
           "checksums", f"{EXPERT}.w1.scale", (W1,)),
    Damage("the lowest bit of a scale", set_bytes(f"{EXPERT}.w1.scale", 17, -0x01), None,
           "checksums", W1, (W1,)),
    Damage("a high bit of a scale", set_bytes("layers.1.attn.wo_a.scale", 3, -0x20), "values",
           "checksums", "layers.1.attn.wo_a.scale", (WO_A,)),
    Damage("the scale grids of w1 and w3 swapped",
           swap((f"{EXPERT}.w1.scale", f"{EXPERT}.w3.scale")), None, "checksums", W1,
           (W1, f"{EXPERT}.w3.weight")),
    Damage("w1 and w3 of an expert swapped",
           swap((W1, f"{EXPERT}.w3.weight"), (f"{EXPERT}.w1.scale", f"{EXPERT}.w3.scale")), None,
           "checksums", W1, (W1, f"{EXPERT}.w3.weight")),
    Damage("two experts swapped",
           swap(*zip(parts(EXPERT), parts("layers.1.ffn.experts.6"), strict=True)), None,
           "checksums", W1, weights(EXPERT, "layers.1.ffn.experts.6")),
    Damage("all experts of a layer off by one", shift_experts, None, "checksums", W1,
           weights(*(f"layers.1.ffn.experts.{number}" for number in range(8)))),
    Damage("an expert's weight over another one's",
           lambda root: copy_tensor(root, "layers.1.ffn.experts.6.w1", f"{EXPERT}.w1"), "values",
           "checksums", "layers.1.ffn.experts.6.w1.weight", (W1,)),
    Damage("the nibbles of an FP4 weight in the wrong order",
           apply_to(W1, lambda data: data << 4 | data >> 4), None, "checksums", W1, (W1,)),
    Damage("the rows of a weight in another order",
           apply_to("layers.1.attn.wq_b.weight", lambda data: data.reshape(-1, 128)[::-1].ravel()),
           None, "checksums", "layers.1.attn.wq_b.weight", ("layers.1.attn.wq_b.weight",)),
    Damage("the norms of two layers swapped", lambda root: swap_norms(root), None, "checksums",
           NORM, (NORM, "layers.0.attn_norm.weight")),
    Damage("a page of zeros in an FP4 weight", fill(W1, 4096, 8192, 0), "values", "checksums", W1,
           (W1,)),
    Damage("a zeroed 128x128 block of an FP8 weight",
           apply_to(WO_A, lambda data: zero_tile(data)), "values", "checksums", WO_A, (WO_A,)),
    Damage("a page of zeros in the embedding", fill("embed.weight", 8192, 12288, 0), "values",
           "checksums", "embed.weight", ("embed.weight",)),
    Damage("one row of a gate zeroed", fill("layers.1.ffn.gate.weight", 0, 512, 0), None,
           "checksums", "layers.1.ffn.gate.weight", ("layers.1.ffn.gate.weight",)),
    Damage("scales far too small (codes saturated)",
           apply_to(W1, lambda data: data | np.uint8(0x77)), "values", "checksums", W1, (W1,)),
    Damage("scales far too large (codes all small)", requantise(0x99, 3), "values", "checksums",
           W1, (W1,)),
    Damage("an expert id out of range", set_bytes(IDS, 80, 8), "values", "checksums", IDS, (IDS,)),
    Damage("a wrong expert id, but in range",
           apply_to(IDS, lambda data: np.roll(data.view("<i8"), 1).view(np.uint8)), None,
           "checksums", IDS, (IDS,)),
    Damage("a scale of -Base that is negative", set_bytes("layers.1.attn.wo_a.scale", 3, -0x80),
           "values", "checksums", "layers.1.attn.wo_a.scale", (WO_A,), "base"),
    Damage("a scale of -Base that is zero",
           set_bytes("layers.1.attn.wo_a.scale", 0, 0, 0, 0, 0), "values", "checksums",
           "layers.1.attn.wo_a.scale", (WO_A,), "base"),
    Damage("a rank's copy of a norm differs",
           set_bytes(NORM, 20, -1, file="model1-mp2.safetensors"), "values", "checksums", NORM,
           (), "mp"),
    Damage("the halves of a split weight on each other's rank", swap_halves, None, "checksums",
           "layers.1.attn.wq_b.weight", ("layers.1.attn.wq_b.weight",), "mp"),
]  # fmt: skip


def copy_tensor(root: Path, source: str, target: str) -> None:
    """A weight and its scales over another one's in the same shard."""
    with edited_file(shard_with(root, f"{source}.weight")) as tensors:
        for part in ("weight", "scale"):
            tensors[f"{target}.{part}"] = tensors[f"{source}.{part}"]


def swap_norms(root: Path) -> None:
    """Two norms in their shard or shards."""
    other = "layers.0.attn_norm.weight"
    with stored(root, NORM) as data:
        mine = data.copy()
    with stored(root, other) as data:
        theirs = data.copy()
        data[:] = mine
    with stored(root, NORM) as data:
        data[:] = theirs


def zero_tile(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """wo_a of the tiny checkpoints is 512 x 256."""
    tiles = data.reshape(4, 128, 2, 128)
    tiles[1, :, 1] = 0
    return tiles.ravel()


STRUCTURE = [
    Damage("a shard cut short by one byte", resize(SHARDS[1], -1), "structure", "structure",
           SHARDS[1]),
    Damage("eight bytes more at a shard's end", resize(SHARDS[1], 8), "structure", "structure",
           SHARDS[1]),
    Damage("a header length of 2**63", lambda root: patch(root / SHARDS[1], 7, 0x80), "structure",
           "structure", SHARDS[1]),
    Damage("a shard lost", delete(SHARDS[1]), "structure", "structure", SHARDS[1]),
    Damage("a shard of another revision, same header", stale, None, "checksums", SHARDS[1],
           stale_weights(golden("tiny-fp4"))),
    Damage("a shard of another sharding beside them",
           lambda root: (root / "model-00001-of-00002.safetensors").write_bytes(
               (root / SHARDS[0]).read_bytes()), "structure", "structure",
           "model-00001-of-00002.safetensors"),
    Damage("a shard that is a link out of the folder", link_out, "structure", "structure",
           SHARDS[1]),
    Damage("a weight's scales lost", lose(f"{EXPERT}.w1.scale"), "structure", "structure",
           f"{EXPERT}.w1.scale"),
    Damage("a weight lost", lose(NORM), "structure", "structure", NORM),
    Damage("a weight more", rename("layers.1.attn.wkv.scale", "layers.1.attn.wkv.weight_scale_inv"),
           "structure", "structure", "layers.1.attn.wkv.weight_scale_inv"),
    Damage("experts numbered from 1", number_from_one, "structure", "structure",
           "layers.1.ffn.experts.8.w1.weight"),
    Damage("a weight in two shards", hold_twice, "structure", "structure", NORM),
    Damage("overlapping offsets", overlap, "structure", "structure", NORM),
    Damage("offsets that run backwards", header(NORM, data_offsets=[1024, 512]), "structure",
           "structure", NORM),
    Damage("a wrong shape, the same size", header(WO_A, shape=[256, 512]), "structure",
           "structure", WO_A),
    Damage("a wrong dtype, the same size (I8 as U8)", header(W1, dtype="U8"), "structure",
           "structure", W1),
    Damage("a wrong dtype, the same size (BF16 as F16)", header(NORM, dtype="F16"), "structure",
           "structure", NORM),
    Damage("scales as U8 instead of F8_E8M0", header(f"{EXPERT}.w1.scale", dtype="U8"),
           "structure", "structure", f"{EXPERT}.w1.scale"),
    Damage("index: a weight in the wrong shard",
           index(lambda value: value["weight_map"].update({NORM: SHARDS[2]})), "structure",
           "structure", NORM),
    Damage("index: an entry missing", index(lambda value: value["weight_map"].pop(NORM)),
           "structure", "structure", NORM),
    Damage("index: a weight that no shard holds",
           index(lambda value: value["weight_map"].update({"layers.1.x.weight": SHARDS[0]})),
           "structure", "structure", "layers.1.x.weight"),
    Damage("index: a wrong total_size",
           index(lambda value: value["metadata"].update(total_size=1)), "structure", "structure",
           INDEX),
    Damage("index lost", delete(INDEX), "structure", "structure", INDEX),
    Damage("config.json lost", delete("config.json"), "structure", "structure", "config.json"),
    Damage("inference/config.json of another model",
           lambda root: edit_json(root / "inference/config.json", route_scale=2.5), "structure",
           "structure", "inference/config.json"),
    Damage("an unfinished conversion", write(".dsv4-partial/journal.jsonl", "{}"), "structure",
           "structure", ".dsv4-partial"),
    Damage("a pickle beside the weights", write("pytorch_model.bin", "x"), "structure",
           "structure", "pytorch_model.bin"),
    Damage("a rank's file lost", delete("model1-mp2.safetensors"), "structure", "structure",
           "model1-mp2.safetensors", (), "mp"),
    Damage("two ranks' files swapped", swap_ranks, "structure", "structure",
           "model0-mp2.safetensors", (), "mp"),
]  # fmt: skip

BESIDE = [
    Damage("the tokenizer edited", write("tokenizer.json", '{"version": "2"}'), None, "checksums",
           "tokenizer.json", ("tokenizer.json",)),
    Damage("the tokenizer lost", delete("tokenizer.json"), None, "checksums", "tokenizer.json",
           ("tokenizer.json",)),
    Damage("a file more", write("added_tokens.json", "{}"), None, "checksums",
           "added_tokens.json"),
    Damage("the manifest edited (a digest)",
           edit_manifest(lambda value: value["tensors"][W1].update(digest="0" * 64)), None,
           "checksums", "dsv4-manifest.json"),
    Damage("the manifest edited (a file's hash)",
           edit_manifest(lambda value: value["files"][SHARDS[0]].update(sha256="0" * 64)), None,
           "checksums", SHARDS[0]),
    Damage("the manifest cut short",
           lambda root: cut(root / "dsv4-manifest.json"), None, "checksums", "dsv4-manifest.json"),
    Damage("SHA256SUMS edited", edit_sums, None, "checksums", "SHA256SUMS"),
    Damage("SHA256SUMS lost", lambda root: (root / "SHA256SUMS").unlink(missing_ok=True), None,
           "checksums", "SHA256SUMS"),
]  # fmt: skip


def patch(path: Path, at: int, value: int) -> None:
    """One byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] = value
    path.write_bytes(raw)


def cut(path: Path) -> None:
    """The first half of a file, if it is there."""
    if path.exists():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_json(path: Path, **changes: Any) -> None:
    """A JSON file with some keys changed."""
    with edited_json(path) as value:
        value.update(changes)


ALL = [*VALUES, *STRUCTURE, *BESIDE]
