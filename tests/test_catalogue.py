"""The catalogue against what is known of the published checkpoints: counts, bytes, shapes, ranks.

The figures are those of public audits of the files (the releases' index totals), not of this code.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from dsv4_quant.catalogue import (
    Catalogue,
    Formats,
    Layout,
    check_gpus,
    possible_gpus,
    published_formats,
    stored,
)
from dsv4_quant.checkpoint.placement import geometry, pieces
from dsv4_quant.config import parse_config, read_config
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.blocks import BF16, FP4, Format, fp8

CONFIGS = Path(__file__).parent / "configs"
F32_SCALES = fp8((128, 128), "f32")
FP8 = fp8((128, 128))


@cache
def published(name: str, *, base: bool = False) -> Catalogue:
    """A release as its files hold it; -Base holds F32 scales, which its config does not say."""
    config = read_config(CONFIGS / f"{name}.json")
    formats = Formats(F32_SCALES, F32_SCALES, F32_SCALES) if base else published_formats(config)
    return Catalogue(config, formats)


RELEASES = {
    "V4-Flash": published("V4-Flash"),
    "V4-Flash-first-revision": published("V4-Flash-first-revision"),
    "V4-Flash-Base": published("V4-Flash-Base", base=True),
    "V4-Pro": published("V4-Pro"),
    "V4-Pro-Base": published("V4-Pro", base=True),
    "V4-Flash-0731": published("V4-Flash-0731"),
    "V4-Pro-0813": published("V4-Pro-0813"),
}


TOTALS = {
    "V4-Flash": (69_187, 159_609_485_896),
    "V4-Flash-Base": (69_187, 292_555_345_480),
    "V4-Pro": (145_116, 864_704_792_696),
    "V4-Pro-Base": (145_116, 1_602_325_824_632),
    "V4-Flash-0731": (72_317, 166_878_536_440),
    "V4-Pro-0813": (149_782, 892_727_580_904),
}
"""Tensors on disk and their bytes: metadata.total_size of the published indexes."""


def test_the_first_revision_holds_what_the_later_one_does() -> None:
    first, later = RELEASES["V4-Flash-first-revision"], RELEASES["V4-Flash"]
    assert first.formats == later.formats and first.specs == later.specs


@pytest.mark.parametrize(
    ("release", "dtypes"),
    [
        ("V4-Flash", {
            "I8": (33_792, 141_733_920_768), "F8_E4M3": (375, 6_023_020_544),
            "F8_E8M0": (34_167, 8_858_737_664), "BF16": (433, 2_830_518_528),
            "F32": (417, 144_672_072), "I64": (3, 18_616_320),
        }),
        ("V4-Flash-Base", {
            "F8_E4M3": (34_167, 289_490_862_080), "BF16": (433, 2_830_518_528),
            "F32": (34_584, 215_348_552), "I64": (3, 18_616_320),
        }),
        ("V4-Flash-0731", {
            "I8": (35_328, 148_176_371_712), "F8_E4M3": (390, 6_304_038_912),
            "F8_E8M0": (35_718, 9_261_408_000), "BF16": (445, 2_967_134_976),
            "F32": (433, 150_966_520), "I64": (3, 18_616_320),
        }),
        ("V4-Pro", {
            "I8": (71_424, 786_381_668_352), "F8_E4M3": (528, 23_169_335_296),
            "F8_E8M0": (71_952, 49_150_268_416), "BF16": (619, 5_633_798_656),
            "F32": (590, 351_105_656), "I64": (3, 18_616_320),
        }),
        ("V4-Pro-Base", {
            "F8_E4M3": (71_952, 1_595_932_672_000), "BF16": (619, 5_633_798_656),
            "F32": (72_542, 740_737_656), "I64": (3, 18_616_320),
        }),
        ("V4-Pro-0813", {
            "I8": (73_728, 811_748_818_944), "F8_E4M3": (543, 23_952_621_568),
            "F8_E8M0": (74_271, 50_735_763_136), "BF16": (631, 5_909_640_704),
            "F32": (606, 362_120_232), "I64": (3, 18_616_320),
        }),
    ],
)  # fmt: skip
def test_published_counts_and_bytes(release: str, dtypes: dict[str, tuple[int, int]]) -> None:
    names = set()
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for tensor in RELEASES[release].stored("hf"):
        names.add(tensor.name)
        count[tensor.dtype] += 1
        total[tensor.dtype] += tensor.nbytes
    assert (len(names), total.total()) == TOTALS[release]
    assert count.total() == len(names)
    assert {dtype: (count[dtype], total[dtype]) for dtype in count} == dtypes


@pytest.mark.parametrize(
    ("release", "total"),
    [
        ("V4-Flash", 292_502_338_120),
        ("V4-Flash-0731", 305_811_972_856),
        ("V4-Pro", 1_602_033_600_632),
        ("V4-Pro-0813", 1_653_841_189_096),
    ],
)
def test_bytes_with_fp8_experts(release: str, total: int) -> None:
    fp8_experts = RELEASES[release].with_formats(Formats(FP8, FP8, FP8))
    assert sum(tensor.nbytes for tensor in fp8_experts.stored("hf")) == total


@pytest.mark.parametrize(
    ("release", "total"),
    [
        ("V4-Flash", 581_975_531_080),
        ("V4-Flash-0731", 608_450_282_488),
        ("V4-Pro", 3_197_868_864_632),
        ("V4-Pro-0813", 3_301_190_896_168),
    ],
)
def test_bytes_with_everything_in_bf16(release: str, total: int) -> None:
    bf16 = RELEASES[release].with_formats(Formats(BF16, BF16, BF16))
    assert sum(tensor.nbytes for tensor in bf16.stored("hf")) == total
    assert not any(tensor.is_scale for tensor in bf16.stored("hf"))


def per_block(release: str) -> Counter[str]:
    """Tensors on disk by block: ``layers.3``, ``mtp.0``, or the top level's ``""``."""
    names = (re.match(r"(?:layers|mtp)\.\d+|", t.name) for t in RELEASES[release].stored("hf"))
    return Counter(match[0] for match in names if match)


@pytest.mark.parametrize(
    ("release", "plain", "csa", "hca", "mtp"),
    [
        ("V4-Flash", 1565, 1576, 1569, [1575]),
        ("V4-Flash-0731", 1565, 1576, 1569, [1568, 1565, 1572]),
        ("V4-Pro", None, 2344, 2337, [2343]),
        ("V4-Pro-0813", None, 2344, 2337, [2336, 2333, 2340]),
    ],
)
def test_tensors_per_block(
    release: str, plain: int | None, csa: int, hca: int, mtp: list[int]
) -> None:
    counts, config = per_block(release), RELEASES[release].config
    by_ratio = {0: plain, 4: csa, 128: hca}
    for layer in range(config.num_hidden_layers):
        assert counts[f"layers.{layer}"] == by_ratio[config.compress_ratios[layer]]
    assert [counts[f"mtp.{k}"] for k in range(config.num_mtp_blocks)] == mtp
    assert counts[""] == 6
    assert counts.total() == TOTALS[release][0]


@pytest.mark.parametrize("release", ["V4-Flash", "V4-Pro"])
def test_distinct_name_patterns(release: str) -> None:
    names = {re.sub(r"\.\d+\.", ".N.", tensor.name) for tensor in RELEASES[release].stored("hf")}
    assert len(names) == 98


@pytest.mark.parametrize(
    ("release", "layer", "total"),
    [
        ("V4-Flash", 0, 3_566_148_952),
        ("V4-Flash", 2, 3_596_055_640),
        ("V4-Flash", 4, 3_589_851_224),
        ("V4-Flash", 3, 3_568_596_312),
    ],
)
def test_bytes_of_published_shards(release: str, layer: int, total: int) -> None:
    of_layer = (t for t in RELEASES[release].stored("hf") if t.spec.layer == layer)
    assert sum(tensor.nbytes for tensor in of_layer) == total


FLASH_SHAPES = {
    "embed.weight": ("BF16", (129280, 4096)),
    "hc_head_fn": ("F32", (4, 16384)),
    "hc_head_scale": ("F32", (1,)),
    "layers.0.attn.attn_sink": ("F32", (64,)),
    "layers.0.attn.wq_a.scale": ("F8_E8M0", (8, 32)),
    "layers.0.attn.wo_a.weight": ("F8_E4M3", (8192, 4096)),
    "layers.0.attn.wo_b.scale": ("F8_E8M0", (32, 64)),
    "layers.0.ffn.gate.tid2eid": ("I64", (129280, 6)),
    "layers.3.ffn.gate.bias": ("F32", (256,)),
    "layers.3.ffn.experts.255.w1.weight": ("I8", (2048, 2048)),
    "layers.3.ffn.experts.0.w2.weight": ("I8", (4096, 1024)),
    "layers.3.ffn.experts.0.w2.scale": ("F8_E8M0", (4096, 64)),
    "layers.0.hc_attn_fn": ("F32", (24, 16384)),
    "layers.3.attn.compressor.ape": ("F32", (128, 512)),
    "layers.3.attn.compressor.wkv.weight": ("BF16", (512, 4096)),
    "layers.2.attn.compressor.ape": ("F32", (4, 1024)),
    "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1024)),
    "layers.2.attn.indexer.compressor.ape": ("F32", (4, 256)),
    "layers.2.attn.indexer.compressor.norm.weight": ("BF16", (128,)),
    "mtp.0.e_proj.scale": ("F8_E8M0", (32, 32)),
    "mtp.0.hc_head_base": ("F32", (4,)),
    "mtp.0.ffn.gate.bias": ("F32", (256,)),
}
PRO_SHAPES = {
    "layers.0.attn.wq_b.weight": ("F8_E4M3", (65536, 1536)),
    "layers.0.attn.wo_a.scale": ("F8_E8M0", (128, 32)),
    "layers.0.attn.wo_b.weight": ("F8_E4M3", (7168, 16384)),
    "layers.5.ffn.experts.383.w3.weight": ("I8", (3072, 3584)),
    "layers.5.ffn.experts.383.w3.scale": ("F8_E8M0", (3072, 224)),
    "layers.0.attn.compressor.ape": ("F32", (128, 512)),
    "layers.2.attn.indexer.wq_b.scale": ("F8_E8M0", (64, 12)),
}
DSPARK_SHAPES = {
    "mtp.0.main_proj.weight": ("F8_E4M3", (4096, 12288)),
    "mtp.0.main_proj.scale": ("F8_E8M0", (32, 96)),
    "mtp.2.norm.weight": ("BF16", (4096,)),
    "mtp.2.markov_head.markov_w1.weight": ("BF16", (129280, 256)),
    "mtp.2.confidence_head.proj.weight": ("BF16", (1, 4352)),
}
BASE_SHAPES = {
    "layers.0.ffn.experts.0.w1.weight": ("F8_E4M3", (2048, 4096)),
    "layers.0.ffn.experts.0.w1.scale": ("F32", (16, 32)),
    "layers.0.attn.wq_a.scale": ("F32", (8, 32)),
}


@pytest.mark.parametrize(
    ("release", "shapes"),
    [
        ("V4-Flash", FLASH_SHAPES), ("V4-Pro", PRO_SHAPES), ("V4-Flash-0731", DSPARK_SHAPES),
        ("V4-Flash-Base", BASE_SHAPES),
    ],
)  # fmt: skip
def test_published_shapes(release: str, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    found = {t.name: (t.dtype, t.shape) for t in RELEASES[release].stored("hf")}
    assert {name: found.get(name) for name in shapes} == shapes


def test_what_must_not_be_there() -> None:
    for release in ("V4-Flash", "V4-Flash-0731"):
        catalogue = RELEASES[release]
        names = {tensor.name for tensor in catalogue.stored("hf")}
        assert not {n for n in names if n.startswith("mtp.") and "tid2eid" in n}
        assert "layers.0.ffn.gate.bias" not in names and "layers.3.ffn.gate.tid2eid" not in names
        assert "mtp.0.emb.weight" not in names and "mtp.0.head.weight" not in names
        dspark = {n for n in names if "markov" in n or "main_proj" in n}
        assert bool(dspark) == catalogue.config.is_dspark
        assert bool({n for n in names if "e_proj" in n}) != catalogue.config.is_dspark


# (release, GPUs) -> tensors and bytes of rank 0 with FP4 experts, bytes with FP8 experts
RANKS = [
    ("V4-Flash", 1, 69_143, 161_085_790_792, 293_978_643_016),
    ("V4-Flash", 4, 18_455, 41_983_265_224, 75_206_478_280),
    ("V4-Flash", 8, 10_007, 22_132_844_296, 38_744_450_824),
    ("V4-Flash-0731", 4, 19_279, 43_884_972_280, 78_618_331_384),
    ("V4-Flash-0731", 8, 10_447, 23_128_809_976, 40_495_489_528),
    ("V4-Pro", 8, 20_062, 115_064_105_016, 207_230_206_008),
    ("V4-Pro", 16, 11_134, 61_221_163_352, 107_304_213_848),
    ("V4-Pro-0813", 8, 20_694, 118_789_323_304, 213_928_524_328),
    ("V4-Pro-0813", 16, 11_478, 63_201_254_536, 110_770_855_048),
]


@cache
def converted(release: str, experts: Format) -> Catalogue:
    """As the published converter leaves it."""
    return RELEASES[release].with_formats(Formats(experts, FP8, BF16))


@pytest.mark.parametrize(("release", "gpus", "tensors", "fp4_bytes", "fp8_bytes"), RANKS)
def test_what_every_rank_holds(
    release: str, gpus: int, tensors: int, fp4_bytes: int, fp8_bytes: int
) -> None:
    for experts, total in ((FP4, fp4_bytes), (FP8, fp8_bytes)):
        catalogue = converted(release, experts)
        check_gpus(catalogue, gpus)
        held, count = Counter[int](), Counter[int]()
        for tensor in catalogue.stored("mp"):
            for piece in pieces(tensor, gpus, catalogue.config.n_routed_experts):
                held[piece.rank] += piece.nbytes
                count[piece.rank] += 1
        assert set(count.values()) == {tensors} and set(held.values()) == {total}
        assert sorted(count) == list(range(gpus))


@pytest.mark.parametrize("release", ["V4-Flash-0731", "V4-Pro"])
def test_pieces_tile_their_tensor(release: str) -> None:
    """Every byte of a split tensor is on exactly one rank, of a copied one on all."""
    catalogue, gpus = RELEASES[release], 8
    experts = catalogue.config.n_routed_experts
    last = catalogue.config.num_hidden_layers + catalogue.config.num_mtp_blocks - 1
    for tensor in catalogue.stored("mp"):
        if tensor.spec.layer not in (None, 2, 3, last):
            continue
        rows, row_bytes = geometry(tensor)
        assert rows * row_bytes == tensor.nbytes
        parts = list(pieces(tensor, gpus, experts))
        if tensor.spec.split is None:
            assert [(p.rank, p.nbytes, p.shape) for p in parts] == [
                (rank, tensor.nbytes, tensor.shape) for rank in range(gpus)
            ]
            continue
        assert sum(part.nbytes for part in parts) == tensor.nbytes
        corners = [(part.row, part.column) for part in parts]
        assert corners == sorted(set(corners)) and corners[0] == (0, 0)
        assert (parts[-1].row + parts[-1].rows, parts[-1].column + parts[-1].row_bytes) == (
            rows,
            row_bytes,
        )


def test_experts_go_to_ranks_by_index_range() -> None:
    catalogue = RELEASES["V4-Flash"]
    spec = catalogue.specs["layers.7.ffn.experts.100.w2.weight"]
    assert [
        (piece.rank, piece.shape)
        for tensor in stored(spec, "mp")
        for piece in pieces(tensor, 8, 256)
    ] == [(3, (4096, 2048)), (3, (4096, 64))]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("embed.weight", 0), ("head.weight", 0), ("norm.weight", None), ("hc_head_fn", None),
        ("layers.2.attn.attn_sink", 0), ("layers.2.attn.wq_a.weight", None),
        ("layers.2.attn.wq_b.weight", 0), ("layers.2.attn.wkv.weight", None),
        ("layers.2.attn.wo_a.weight", 0), ("layers.2.attn.wo_b.weight", 1),
        ("layers.2.attn.indexer.wq_b.weight", 0), ("layers.2.ffn.gate.weight", None),
        ("layers.2.attn.indexer.weights_proj.weight", 0), ("layers.2.ffn.gate.tid2eid", None),
        ("layers.2.attn.indexer.compressor.wkv.weight", None),
        ("layers.2.ffn.shared_experts.w1.weight", None),
        ("layers.2.ffn.experts.9.w1.weight", "expert"), ("mtp.0.main_proj.weight", None),
        ("mtp.2.markov_head.markov_w1.weight", 0), ("mtp.2.markov_head.markov_w2.weight", 0),
        ("mtp.2.confidence_head.proj.weight", None),
    ],
)  # fmt: skip
def test_how_the_published_code_splits(name: str, split: int | str | None) -> None:
    assert RELEASES["V4-Flash-0731"].specs[name].split == split


@pytest.mark.parametrize(
    ("release", "counts"),
    [
        ("V4-Flash", [1, 2, 4, 8]),
        ("V4-Flash-Base", [1, 2, 4, 8]),
        ("V4-Flash-0731", [1, 2, 4, 8]),
        ("V4-Pro", [1, 2, 4, 8, 16]),
        ("V4-Pro-0813", [1, 2, 4, 8, 16]),
    ],
)
def test_possible_gpu_counts(release: str, counts: list[int]) -> None:
    catalogue = RELEASES[release]
    assert possible_gpus(catalogue) == counts
    for gpus in (0, -1, 3, 5, 6, 7, 12, 32, 10**9):
        with pytest.raises(UsageError) as caught:
            check_gpus(catalogue, gpus)
        assert f"Possible GPU counts: {', '.join(map(str, counts))}." in str(caught.value)
    for gpus in counts:
        check_gpus(catalogue, gpus)


@pytest.mark.parametrize(
    ("changes", "gpus", "named"),
    [
        ({"n_routed_experts": 12}, 8, "n_routed_experts (12)"),
        ({"num_attention_heads": 4, "o_groups": 4}, 8, "num_attention_heads (4)"),
        ({"o_groups": 2}, 4, "o_groups (2)"),
        ({"vocab_size": 510}, 4, "vocab_size (510)"),
        ({"index_n_heads": 2}, 4, "index_n_heads (2)"),
        ({"o_lora_rank": 128, "o_groups": 2}, 4, "blocks of 128 along axis 1 of attn.wo_b.weight"),
        ({"index_head_dim": 32}, 4, "blocks of 128 along axis 0 of attn.indexer.wq_b.weight (2)"),
        ({"head_dim": 64, "qk_rope_head_dim": 64}, 8, "attn.wq_b.weight (4)"),
    ],
)
def test_what_cannot_be_split_is_named(changes: dict[str, int], gpus: int, named: str) -> None:
    tiny = read_config(Path(__file__).parent / "golden/tiny-fp4/checkpoint/config.json")
    config = parse_config({**tiny.raw, **changes})
    catalogue = Catalogue(config, published_formats(config))
    with pytest.raises(UsageError) as caught:
        check_gpus(catalogue, gpus)
    assert named in str(caught.value)


def test_blocks_of_32_allow_more_gpus() -> None:
    tiny = read_config(Path(__file__).parent / "golden/tiny-fp4/checkpoint/config.json")
    raw = {**tiny.raw, "index_head_dim": 32}
    small = raw | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    for config, counts in ((raw, [1, 2]), (small, [1, 2, 4])):
        parsed = parse_config(config)
        assert possible_gpus(Catalogue(parsed, published_formats(parsed))) == counts


def test_any_expert_count() -> None:
    """A published 0731 repackage with 160 of 256 experts (REAP) holds 45,821 tensors."""
    flash = read_config(CONFIGS / "V4-Flash-0731.json")
    config = parse_config({**flash.raw, "n_routed_experts": 160})
    catalogue = Catalogue(config, published_formats(config))
    assert sum(1 for _ in catalogue.stored("hf")) == 72_317 - 46 * 96 * 6 == 45_821
    assert catalogue.specs["layers.9.ffn.gate.weight"].shape == (160, 4096)
    assert catalogue.specs["layers.9.ffn.gate.bias"].shape == (160,)
    assert possible_gpus(catalogue) == [1, 2, 4, 8]


def test_what_a_config_without_expert_dtype_means() -> None:
    """FP4 in the first V4-Flash revision; in the flat dialect the type of the rest, FP8."""
    first = read_config(CONFIGS / "V4-Flash-first-revision.json")
    assert first.expert_dtype is None
    assert published_formats(first) == Formats(FP4, FP8, FP8)
    flat = {**read_config(CONFIGS / "V4-Flash.inference.json").raw}
    assert published_formats(parse_config(flat)) == Formats(FP4, FP8, FP8)
    del flat["expert_dtype"]
    assert published_formats(parse_config(flat)) == Formats(FP8, FP8, FP8)
    assert published_formats(parse_config(flat | {"dtype": "bf16"})) == Formats(BF16, BF16, BF16)
    plain = {k: v for k, v in first.raw.items() if k != "quantization_config"}
    assert published_formats(parse_config(plain)) == Formats(BF16, BF16, BF16)


@pytest.mark.parametrize("layout", ["hf", "mp"])
def test_stored_bytes_do_not_depend_on_the_layout(layout: Layout) -> None:
    spec = RELEASES["V4-Flash"].specs["layers.3.ffn.experts.0.w1.weight"]
    weight, scale = stored(spec, layout)
    assert (weight.name, scale.name) == (spec.name, spec.name[: -len("weight")] + "scale")
    assert weight.dtype == ("I8" if layout == "hf" else "F4")
    assert weight.shape == ((2048, 2048) if layout == "hf" else (2048, 4096))
    assert weight.nbytes == 2048 * 4096 // 2 and scale.nbytes == 2048 * 128
    assert not weight.is_scale and scale.is_scale and weight.spec is scale.spec is spec


def test_layers_count_on_through_the_mtp_blocks() -> None:
    catalogue = RELEASES["V4-Flash-0731"]
    assert catalogue.specs["embed.weight"].layer is None
    assert catalogue.specs["layers.42.attn.wkv.weight"].layer == 42
    assert catalogue.specs["mtp.2.attn.wkv.weight"].layer == 45
    assert catalogue.specs["mtp.1.ffn.experts.7.w1.weight"].expert == 7
    assert next(iter(catalogue.specs)) == "embed.weight"
    assert all(name == spec.name for name, spec in catalogue.specs.items())
