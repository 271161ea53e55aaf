"""Inspection: figures of the published checkpoints, from headers of files that hold no data."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_quant.catalogue import (
    Catalogue,
    Formats,
    Layout,
    StoredTensor,
    possible_gpus,
    published_formats,
)
from dsv4_quant.checkpoint.header import build_header
from dsv4_quant.checkpoint.placement import pieces
from dsv4_quant.config import read_config
from dsv4_quant.errors import UnreadableError, UsageError
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8
from dsv4_quant.inspection import inspect, split_over
from dsv4_quant.releases import guess_release
from tests.folders import INDEX, copy_of, edited_file, golden, shard_with

CONFIGS = Path(__file__).parent / "configs"
FP8 = fp8((128, 128))
FP8_F32 = fp8((128, 128), "f32")


def catalogue_of(path: Path, formats: Formats | None = None) -> Catalogue:
    config = read_config(path)
    return Catalogue(config, formats or published_formats(config))


def hollow(root: Path, catalogue: Catalogue, layout: Layout, gpus: int = 1) -> Path:
    """True headers over holes: a checkpoint of any size that takes no room."""
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
    experts = catalogue.config.n_routed_experts

    def name(tensor: StoredTensor, rank: int) -> str:
        if layout == "mp":
            return f"model{rank}-mp{gpus}.safetensors"
        return f"model-{(tensor.spec.layer or 0) + 1:05d}-of-00099.safetensors"

    index = {}
    for tensor in catalogue.stored(layout):
        for piece in pieces(tensor, gpus, experts):
            index[tensor.name] = name(tensor, piece.rank)
            files[name(tensor, piece.rank)].append((tensor.name, tensor.dtype, piece.shape))
    root.mkdir()
    for file, tensors in files.items():
        header, entries = build_header(tensors)
        with (root / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + max(entry.end for entry in entries.values()))
    if layout == "hf":
        (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (root / "config.json").write_text(json.dumps(dict(catalogue.config.raw)))
    return root


# --- what is there -------------------------------------------------------------------------------


def test_flash_by_dtype_is_what_was_published(tmp_path: Path) -> None:
    found = inspect(hollow(tmp_path / "flash", catalogue_of(CONFIGS / "V4-Flash.json"), "hf"))
    assert (found.tensors, found.bytes) == (69_187, 159_609_485_896)
    assert (found.release, found.note, found.layout, found.gpus) == ("V4-Flash", "", "hf", 1)
    assert (found.experts, found.dense) == ("fp4 1x32 e8m0", "fp8 128x128 e8m0")
    by_dtype: dict[str, tuple[int, int]] = {}
    for part in found.parts:
        tensors, size = by_dtype.get(part.dtype, (0, 0))
        by_dtype[part.dtype] = (tensors + part.tensors, size + part.bytes)
    assert by_dtype == {
        "I8": (33_792, 141_733_920_768),
        "F8_E4M3": (375, 6_023_020_544),
        "F8_E8M0": (34_167, 8_858_737_664),
        "BF16": (433, 2_830_518_528),
        "F32": (417, 144_672_072),
        "I64": (3, 18_616_320),
    }
    by_role = {(part.role, part.dtype): part.tensors for part in found.parts}
    assert len(by_role) == len(found.parts)
    assert by_role["experts", "I8"] == 43 * 256 * 3
    assert by_role["mtp", "I8"] == 256 * 3
    assert by_role["gate", "I64"] == 3


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_golden(case: str) -> None:
    found = inspect(golden(case))
    index = json.loads((golden(case) / INDEX).read_bytes())
    assert found.bytes == index["metadata"]["total_size"]
    assert found.tensors == len(index["weight_map"])
    assert found.files == len(set(index["weight_map"].values()))
    assert found.release == "custom" and found.note == "" and found.split is None


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_rank_files_count_every_copy(tmp_path: Path, gpus: int) -> None:
    catalogue = catalogue_of(golden("tiny-fp4") / "config.json")
    catalogue = catalogue.with_formats(replace(catalogue.formats, wo_a=BF16))
    folder = hollow(tmp_path / "mp", catalogue, "mp", gpus)
    found = inspect(folder, gpus)
    headers = [file.read_bytes() for file in folder.glob("*.safetensors")]
    held = [json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) for raw in headers]
    assert (found.layout, found.gpus, found.files, found.wo_a) == ("mp", gpus, gpus, "bf16")
    assert found.tensors == sum(len(header) for header in held)
    assert found.bytes == sum(max(e["data_offsets"][1] for e in h.values()) for h in held)
    assert found.split is not None
    (fp4,) = [one for one in found.split.per_gpu if one.is_held]
    assert (fp4.experts, fp4.bytes * gpus, fp4.tensors * gpus) == (
        "fp4",
        found.bytes,
        found.tensors,
    )


# --- what each GPU would hold --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "tensors", "fp4", "fp8_bytes"),
    [
        ("V4-Flash", 1, 69_143, 161_085_790_792, 293_978_643_016),
        ("V4-Flash", 4, 18_455, 41_983_265_224, 75_206_478_280),
        ("V4-Flash", 8, 10_007, 22_132_844_296, 38_744_450_824),
        ("V4-Flash-0731", 4, 19_279, 43_884_972_280, 78_618_331_384),
        ("V4-Flash-0731", 8, 10_447, 23_128_809_976, 40_495_489_528),
        ("V4-Pro", 8, 20_062, 115_064_105_016, 207_230_206_008),
        ("V4-Pro", 16, 11_134, 61_221_163_352, 107_304_213_848),
        ("V4-Pro-0813", 8, 20_694, 118_789_323_304, 213_928_524_328),
        ("V4-Pro-0813", 16, 11_478, 63_201_254_536, 110_770_855_048),
    ],
)
def test_split_of_the_releases(
    name: str, gpus: int, tensors: int, fp4: int, fp8_bytes: int
) -> None:
    split = split_over(catalogue_of(CONFIGS / f"{name}.json"), gpus)
    assert [(one.experts, one.is_held) for one in split.per_gpu] == [
        ("fp4", True),
        ("fp8", False),
        ("bf16", False),
    ]
    assert [(one.tensors, one.bytes) for one in split.per_gpu[:2]] == [
        (tensors, fp4),
        (tensors, fp8_bytes),
    ]


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("held", [FP4, FP8, FP8_F32, BF16])
@pytest.mark.parametrize("dense", [FP8, FP8_F32, BF16])
def test_split_is_the_sum_of_all_pieces(held: Format, dense: Format, gpus: int) -> None:
    """Class by class against tensor by tensor, on every rank."""
    path = golden("tiny-fp4") / "config.json"
    split = split_over(catalogue_of(path, Formats(held, dense, dense)), gpus)
    for one, experts in zip(
        split.per_gpu, (FP4, held if held.kind == "fp8" else FP8, BF16), strict=True
    ):
        ranks = [[0, 0] for _ in range(gpus)]
        for tensor in catalogue_of(path, Formats(experts, dense, BF16)).stored("mp"):
            for piece in pieces(tensor, gpus, 8):
                ranks[piece.rank][0] += 1
                ranks[piece.rank][1] += piece.nbytes
        assert ranks == [[one.tensors, one.bytes]] * gpus
        assert one.is_held == (experts == held)


@pytest.mark.parametrize("gpus", [-1, 0, 3, 8, 1000])
def test_impossible_gpu_counts(gpus: int) -> None:
    with pytest.raises(UsageError, match="Possible GPU counts: 1, 2, 4"):
        inspect(golden("tiny-fp4"), gpus)


def test_every_possible_gpu_count_is_answered() -> None:
    flash = catalogue_of(CONFIGS / "V4-Flash.json")
    sizes = [split_over(flash, n).per_gpu[0].bytes for n in possible_gpus(flash)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) >= 4


# --- releases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "formats", "release", "note"),
    [
        ("V4-Flash", None, "V4-Flash", ""),
        ("V4-Flash-first-revision", None, "V4-Flash", ""),
        ("V4-Flash-Base", Formats(FP8_F32, FP8_F32, FP8_F32), "V4-Flash-Base", ""),
        ("V4-Flash-Base", Formats(BF16, FP8_F32, BF16), "V4-Flash-Base", ""),
        ("V4-Flash", Formats(FP8, FP8, BF16), "V4-Flash", ""),
        ("V4-Flash", Formats(BF16, BF16, BF16), "V4-Flash", "or V4-Flash-Base: in BF16"),
        ("V4-Flash-0731", None, "V4-Flash-0731", ""),
        ("V4-Flash-0731", Formats(BF16, BF16, BF16), "V4-Flash-0731", ""),
        ("V4-Pro", None, "V4-Pro", ""),
        ("V4-Pro", Formats(FP8_F32, FP8_F32, FP8_F32), "V4-Pro-Base", ""),
        ("V4-Pro-0813", None, "V4-Pro-0813", ""),
        ("V4-Flash.inference", None, "V4-Flash", ""),
        ("V4-Pro-0813.inference", None, "V4-Pro-0813", ""),
    ],
)
def test_releases(name: str, formats: Formats | None, release: str, note: str) -> None:
    catalogue = catalogue_of(CONFIGS / f"{name}.json", formats)
    found = guess_release(catalogue.config, catalogue.formats)
    assert found.name == release
    assert found.note.startswith(note) and bool(found.note) == bool(note)


def test_a_pruned_release_is_custom_and_says_what_it_resembles() -> None:
    catalogue = catalogue_of(CONFIGS / "V4-Flash-0731.json")
    pruned = replace(catalogue.config, n_routed_experts=160)
    found = guess_release(pruned, catalogue.formats)
    assert (found.name, found.note) == ("custom", "V4-Flash-0731 but n_routed_experts 160")


# --- refusals ------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="No such folder"):
        inspect(tmp_path / "nowhere")


def test_a_checkpoint_that_misses_a_tensor_is_not_described(tmp_path: Path) -> None:
    folder = copy_of("tiny-fp4", tmp_path / "copy")
    with edited_file(shard_with(folder, "layers.3.attn.wo_b.scale")) as tensors:
        del tensors["layers.3.attn.wo_b.scale"]
    with pytest.raises(UnreadableError, match=r"layers\.3\.attn\.wo_b\.scale"):
        inspect(folder)
