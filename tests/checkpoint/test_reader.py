"""The reader hands out what safetensors reads, from either layout, whole or by ranges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import SourceChangedError
from dsv4_quant.formats.blocks import Tensor
from tests.folders import INDEX, copy_of, edited_file, edited_json, golden, read_file, shard_with

Ranks = Callable[[str, int, str], Path]
CASES = ["tiny-fp4", "tiny-base"]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def by_safetensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor on disk, read by the safetensors library."""
    found = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def stored_bytes(tensor: Tensor) -> tuple[bytes, bytes | None]:
    """Codes and scales as they lie on disk."""
    return tensor.codes.tobytes(), None if tensor.scales is None else tensor.scales.tobytes()


@cache
def opened(case: str) -> Checkpoint:
    return Checkpoint.open(golden(case))


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_what_safetensors_reads(case: str) -> None:
    theirs, checkpoint = by_safetensors(golden(case)), opened(case)
    assert (checkpoint.layout, checkpoint.gpus) == ("hf", 1)
    seen = set()
    for name, spec in checkpoint.specs.items():
        ours = checkpoint.read(name)
        assert ours.shape == spec.shape and ours.format == spec.format
        assert ours.codes.tobytes() == raw_bytes(theirs[name])
        seen.add(name)
        if ours.scales is not None:
            assert ours.scales.tobytes() == raw_bytes(theirs[spec.scale_name])
            assert ours.scales.shape == tuple(theirs[spec.scale_name].shape)
            seen.add(spec.scale_name)
    assert seen == set(theirs)


@pytest.mark.parametrize("case", CASES)
def test_decoded_values_are_those_of_torch(case: str) -> None:
    theirs, checkpoint = by_safetensors(golden(case)), opened(case)
    for name, spec in checkpoint.specs.items():
        if spec.format.kind == "i64":
            assert np.array_equal(checkpoint.read(name).codes, theirs[name].numpy())
            continue
        codes = theirs[name]
        if spec.format.kind == "fp4":
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
            pairs = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], -1)
            scale = theirs[spec.scale_name].float().repeat_interleave(32, 1)
            values = table[pairs.flatten(1).long()] * scale
        elif spec.format.kind == "fp8":
            scale = theirs[spec.scale_name].float()
            values = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            values = codes.float()
        assert np.array_equal(checkpoint.read(name).decode(), values.numpy()), name


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize(("case", "experts"), [("tiny-fp4", "fp4"), ("tiny-base", "fp8")])
def test_rank_files_are_stitched_to_the_same_bytes(
    ranks: Ranks, case: str, experts: str, gpus: int
) -> None:
    with Checkpoint.open(ranks(case, gpus, experts)) as stitched:
        assert (stitched.layout, stitched.gpus) == ("mp", gpus)
        assert list(stitched.specs) == list(opened(case).specs)
        for name, spec in stitched.specs.items():
            ours, whole = stitched.read(name), opened(case).read(name)
            assert ours.shape == whole.shape == spec.shape
            if spec.kind == "wo_a":  # the published converter decodes it
                assert ours.format.kind == "bf16"
                assert ours.decode().tobytes() == whole.decode().tobytes()
            else:
                assert ours.format == whole.format
                assert stored_bytes(ours) == stored_bytes(whole), name


@pytest.mark.parametrize("gpus", [2, 4])
def test_rank_files_with_cast_experts_hold_the_same_values(ranks: Ranks, gpus: int) -> None:
    with Checkpoint.open(ranks("tiny-fp4", gpus, "fp8")) as cast:
        for name, spec in cast.specs.items():
            if spec.format.kind == "i64":
                continue
            assert np.array_equal(cast.read(name).decode(), opened("tiny-fp4").read(name).decode())
            assert spec.expert is None or str(spec.format) == "fp8 128x128 e8m0"


def test_copies_on_the_other_ranks_are_listed_and_identical(ranks: Ranks) -> None:
    root = ranks("tiny-fp4", 4, "fp4")
    with Checkpoint.open(root) as checkpoint:
        for spec in checkpoint.specs.values():
            for tensor in checkpoint.stored(spec):
                place = checkpoint.locate(tensor)
                owners = [e.file for e in (*place.extents, *place.copies)]
                if spec.split == "expert":
                    assert owners == [f"model{spec.expert // 2}-mp4.safetensors"]
                    continue
                assert owners == [f"model{rank}-mp4.safetensors" for rank in range(4)]
                assert len(place.copies) == (3 if spec.split is None else 0)
        name = "layers.0.ffn.gate.tid2eid"
        contents = {read_file(root / f"model{rank}-mp4.safetensors")[name][2] for rank in range(4)}
        assert contents == {checkpoint.read(name).codes.tobytes()}


def test_extents_tile_every_stored_tensor(ranks: Ranks) -> None:
    """Painted by their extents, every byte of a tensor is painted once."""
    with Checkpoint.open(ranks("tiny-fp4", 4, "fp4")) as checkpoint:
        for spec in checkpoint.specs.values():
            for tensor in checkpoint.stored(spec):
                place = checkpoint.locate(tensor)
                painted = np.zeros((place.rows, place.row_bytes), np.uint8)
                for e in place.extents:
                    painted[e.row : e.row + e.rows, e.column : e.column + e.row_bytes] += 1
                assert painted.size == tensor.nbytes and (painted == 1).all()


NAMES = [
    "layers.0.attn.wo_b.weight", "layers.0.attn.wq_b.weight", "layers.1.ffn.experts.3.w2.weight",
    "layers.1.ffn.experts.0.w1.weight", "embed.weight", "layers.0.attn.attn_sink", "hc_head_fn",
    "layers.0.ffn.gate.tid2eid", "layers.1.attn.indexer.wq_b.weight", "layers.0.attn.wo_a.weight",
]  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, "mp4-fp4", "mp2-fp8"])
def test_rows_are_those_of_the_whole(ranks: Ranks, case: str) -> None:
    root = golden(case) if case in CASES else ranks("tiny-fp4", int(case[2]), case[4:])

    @settings(max_examples=60, deadline=None)
    @given(name=st.sampled_from(NAMES), data=st.data())
    def check(name: str, data: st.DataObject) -> None:
        spec = checkpoint.specs[name]
        rows, cols = spec.matrix
        b = spec.format.block[0] if spec.format.block else 1
        start = b * data.draw(st.integers(0, (rows - 1) // b))
        stop = data.draw(st.integers(start, rows))
        part, whole = checkpoint.read_rows(name, start, stop), checkpoint.read(name)
        if (start, stop) != (0, rows):
            assert part.shape == (stop - start, cols)
        assert part.format == whole.format
        assert part.codes.tobytes() == whole.codes.reshape(rows, -1)[start:stop].tobytes()
        if whole.scales is not None:
            assert part.scales is not None
            assert part.scales.tobytes() == whole.scales[start // b : -(-stop // b)].tobytes()
        if spec.format.kind != "i64" and stop > start:
            values = whole.decode().reshape(rows, cols)[start:stop]
            assert part.decode().tobytes() == values.tobytes()

    with Checkpoint.open(root) as checkpoint:
        check()


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [
        ("layers.0.attn.wo_b.weight", 0, 257), ("layers.0.attn.wo_b.weight", -128, 0),
        ("layers.0.attn.wo_b.weight", 128, 0), ("layers.0.attn.wo_b.weight", 64, 128),
        ("layers.0.attn.wo_b.weight", 256, 384), ("norm.weight", 0, 2), ("embed.weight", 0, 513),
        ("layers.1.ffn.experts.3.w2.weight", 250, 300),
    ],
)  # fmt: skip
def test_rows_that_are_not_there_are_refused(name: str, start: int, stop: int) -> None:
    """Never memory that was not read."""
    with pytest.raises(ValueError, match=name):
        opened("tiny-fp4").read_rows(name, start, stop)


def test_unknown_names() -> None:
    for name in ("layers.0.attn.wq_a.scale", "nothing"):
        with pytest.raises(KeyError, match=name):
            opened("tiny-fp4").read(name)


def test_arrays_are_fresh_and_writable() -> None:
    name = "layers.0.attn.wq_a.weight"
    one = opened("tiny-fp4").read(name)
    assert one.scales is not None
    kept = stored_bytes(one)
    one.codes[:] = 0
    one.scales[:] = 0
    assert stored_bytes(opened("tiny-fp4").read(name)) == kept != stored_bytes(one)


def test_many_threads_read_the_same(ranks: Ranks) -> None:
    with Checkpoint.open(ranks("tiny-fp4", 4, "fp4")) as checkpoint:
        names = list(checkpoint.specs) * 3
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: stored_bytes(checkpoint.read(name)), names))
        assert found == [stored_bytes(checkpoint.read(name)) for name in names]


def test_files_are_closed() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    with Checkpoint.open(str(golden("tiny-fp4"))) as checkpoint:
        assert count() == before  # nothing is held open until it is read
        for name in checkpoint.specs:
            checkpoint.read(name)
        assert count() == before + 3
    assert count() == before


# --- files that change while they are read -------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_of("tiny-fp4", tmp_path / "checkpoint")


def test_a_file_cut_short_while_it_is_read(root: Path) -> None:
    name = "layers.0.attn.wq_a.weight"
    path = shard_with(root, name)
    with Checkpoint.open(root) as checkpoint:
        checkpoint.read(name)
        os.truncate(path, 1000)
        with pytest.raises(SourceChangedError, match=r"became shorter.*run the same") as caught:
            checkpoint.read(name)
        assert caught.value.file == str(path)


@pytest.mark.parametrize("change", ["truncated", "grown", "gone", "a folder", "unreadable link"])
def test_a_file_that_changed_between_header_and_data(root: Path, change: str) -> None:
    name = "layers.0.attn.wq_a.weight"
    path = shard_with(root, name)
    with Checkpoint.open(root) as checkpoint:
        if change == "truncated":
            os.truncate(path, path.stat().st_size - 1)
        elif change == "grown":
            os.truncate(path, path.stat().st_size + 1)
        else:
            path.unlink()
        if change == "a folder":
            path.mkdir()
        elif change == "unreadable link":
            path.symlink_to(path.name)
        with pytest.raises(SourceChangedError) as caught:
            checkpoint.read(name)
        assert caught.value.file == str(path) and "same command again" in str(caught.value)


# --- other shapes and formats --------------------------------------------------------------------


def test_blocks_of_32(root: Path) -> None:
    """The golden checkpoint with every FP8 scale said 16 times: the same values."""
    for path in root.glob("*.safetensors"):
        with edited_file(path) as tensors:
            for name, (dtype, shape, data) in tensors.items():
                if not name.endswith(".scale") or "ffn.experts" in name:
                    continue
                grid = np.frombuffer(data, np.uint8).reshape(shape).repeat(4, 0).repeat(4, 1)
                tensors[name] = (dtype, list(grid.shape), grid.tobytes())
    with edited_json(root / "config.json") as config:
        config["quantization_config"]["weight_block_size"] = [32, 32]
    with Checkpoint.open(root) as checkpoint:
        assert str(checkpoint.catalogue.formats.dense) == "fp8 32x32 e8m0"
        for name, spec in checkpoint.specs.items():
            if spec.kind != "fixed":
                whole = checkpoint.read(name).decode()
                assert whole.tobytes() == opened("tiny-fp4").read(name).decode().tobytes()
        part = checkpoint.read_rows("layers.0.attn.wo_b.weight", 96, 200)
        whole = opened("tiny-fp4").read("layers.0.attn.wo_b.weight").decode()
        assert part.decode().tobytes() == whole[96:200].tobytes()


def test_everything_in_bf16(root: Path) -> None:
    """Decoded by this test: no scale, no quantization_config, the same values."""
    weights = opened("tiny-fp4")
    for path in root.glob("*.safetensors"):
        with edited_file(path) as tensors:
            for name in [name for name in tensors if name.endswith(".scale")]:
                del tensors[name]
            for name in tensors:
                spec = weights.specs[name]
                if spec.format.is_quantised:
                    bits = weights.read(name).decode().view(np.uint32) >> 16
                    tensors[name] = ("BF16", list(spec.shape), bits.astype(np.uint16).tobytes())
    with edited_json(root / "config.json") as config:
        del config["quantization_config"], config["expert_dtype"]
    with edited_json(root / INDEX) as index:
        index["weight_map"] = {
            name: path.name for path in root.glob("*.safetensors") for name in read_file(path)
        }
    with Checkpoint.open(root) as checkpoint:
        assert {spec.format.kind for spec in checkpoint.specs.values()} == {"bf16", "f32", "i64"}
        for name, spec in weights.specs.items():
            if spec.format.kind != "i64":
                ours = checkpoint.read(name).decode()
                assert ours.tobytes() == weights.read(name).decode().tobytes()


def test_a_config_elsewhere(tmp_path: Path, ranks: Ranks) -> None:
    """Rank files of the published converter come without one: it can be given."""
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, "fp4"), tmp_path / "mp"))
    (root / "config.json").unlink()
    with Checkpoint.open(root, config=golden("tiny-fp4") / "config.json") as checkpoint:
        config = json.loads((golden("tiny-fp4") / "config.json").read_bytes())
        assert checkpoint.config.hidden_size == config["hidden_size"]
        checkpoint.read("norm.weight")
