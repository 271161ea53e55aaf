"""Folders as strangers make them: every fault is found and named, at a bounded cost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_quant.catalogue import Catalogue, published_formats
from dsv4_quant.checkpoint import Checkpoint, folder
from dsv4_quant.checkpoint.folder import survey
from dsv4_quant.checkpoint.reader import inspect_folder
from dsv4_quant.config import parse_config
from dsv4_quant.errors import (
    CatalogueError,
    ConfigError,
    HeaderError,
    IndexFileError,
    UnreadableError,
)
from tests.folders import (
    INDEX,
    Loose,
    copy_of,
    edited_file,
    edited_json,
    golden,
    read_file,
    shard_with,
    write_file,
)

Ranks = Callable[[str, int, str], Path]
EXPERT = "layers.1.ffn.experts.3.w2"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_of("tiny-fp4", tmp_path / "checkpoint")


def problems(root: Path) -> list[str]:
    """Every problem's text; each is one short printable paragraph."""
    found = [str(problem) for problem in inspect_folder(root)[0].problems]
    assert all(text.isprintable() and len(text) < 1200 for text in found)
    return found


def refuses(root: Path, kind: type[UnreadableError], *says: str) -> None:
    """``Checkpoint.open`` refuses with one error of this kind that says all of these."""
    with pytest.raises(UnreadableError) as caught:
        Checkpoint.open(root)
    assert type(caught.value) is kind, caught.value
    for part in says:
        assert part in str(caught.value)
    assert str(caught.value).isprintable()


# --- sound folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "files"), [("tiny-fp4", 3), ("tiny-base", 2)])
def test_golden_folders_have_no_problem(case: str, files: int) -> None:
    found = survey(golden(case))
    assert (found.layout, found.gpus, len(found.headers)) == ("hf", 1, files)
    assert problems(golden(case)) == []
    index = json.loads((golden(case) / INDEX).read_bytes())
    assert found.total_size == found.data_bytes == index["metadata"]["total_size"]
    assert found.index == index["weight_map"]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_rank_folders_have_no_problem(ranks: Ranks, gpus: int) -> None:
    found = survey(ranks("tiny-fp4", gpus, "fp8"))
    assert (found.layout, found.gpus) == ("mp", gpus)
    assert list(found.headers) == [f"model{r}-mp{gpus}.safetensors" for r in range(gpus)]
    assert problems(found.root) == []


def test_one_file_needs_no_index(root: Path) -> None:
    merged: Loose = {}
    for path in sorted(root.glob("*.safetensors")):
        merged |= read_file(path)
        path.unlink()
    (root / INDEX).unlink()
    write_file(root / "model.safetensors", merged)
    assert problems(root) == []
    with Checkpoint.open(root) as ours, Checkpoint.open(golden("tiny-fp4")) as theirs:
        name = f"{EXPERT}.weight"
        assert ours.read(name).codes.tobytes() == theirs.read(name).codes.tobytes()


def test_pickles_and_other_files_are_not_even_opened(root: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (root / "executed",))

    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.safetensors.bin"):
        (root / name).write_bytes(pickle.dumps(Bomb()))
        (root / name).chmod(0)
    (root / "notes.json").write_bytes(b"\xff")
    assert problems(root) == []
    assert not (root / "executed").exists()


def test_links_inside_the_folder_are_followed(root: Path) -> None:
    (root / "data").mkdir()
    for path in list(root.glob("model*")):
        path.rename(root / "data" / path.name)
        path.symlink_to(Path("data") / path.name)
    assert problems(root) == []


def hub_cache(source: Path, cache: Path) -> Path:
    """A snapshot as huggingface-hub keeps it: links into the sibling folder of blobs."""
    repo = cache / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, repo / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(golden("tiny-fp4"), tmp_path)
    assert problems(snapshot) == []
    (tmp_path / "link-to-snapshot").symlink_to(snapshot)
    assert problems(tmp_path / "link-to-snapshot") == []


# --- no checkpoint at all ------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file"):
        refuses(path, UnreadableError, "No such folder")
    refuses(tmp_path / ("x" * 300), UnreadableError, "cannot be read: File name too long")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(tmp_path / "loop", UnreadableError)


def test_nothing_that_is_a_checkpoint(tmp_path: Path) -> None:
    refuses(tmp_path, UnreadableError, "holds no model-*-of-*.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    refuses(tmp_path, UnreadableError, "holds no model-*-of-*.safetensors")


def test_two_checkpoints_in_one_folder(root: Path, ranks: Ranks) -> None:
    for rank in (0, 1):
        name = f"model{rank}-mp2.safetensors"
        shutil.copy(ranks("tiny-fp4", 2, "fp4") / name, root / name)
    refuses(root, UnreadableError, "two checkpoints", "model0-mp2", "model-00001-of-00003")


def test_rank_files_of_two_gpu_counts(tmp_path: Path, ranks: Ranks) -> None:
    shutil.copytree(ranks("tiny-fp4", 2, "fp4"), tmp_path / "mp")
    shutil.copy(ranks("tiny-fp4", 4, "fp4") / "model3-mp4.safetensors", tmp_path / "mp")
    refuses(tmp_path / "mp", UnreadableError, "mixes checkpoints for 2, 4 GPUs")


# --- files ---------------------------------------------------------------------------------------


def test_a_missing_shard_is_one_problem(root: Path) -> None:
    (root / "model-00002-of-00003.safetensors").unlink()
    (problem,) = problems(root)
    assert "names a shard that is not there" in problem and "model-00002-of-00003" in problem
    refuses(root, IndexFileError, "The download is not complete; run it again.")


def test_all_shards_missing(root: Path) -> None:
    for path in root.glob("*.safetensors"):
        path.unlink()
    assert len([p for p in problems(root) if "names a shard that is not there" in p]) == 3


@pytest.mark.parametrize("name", ["model-00004-of-00003.safetensors", "model.safetensors"])
def test_a_stale_shard(root: Path, name: str) -> None:
    shutil.copy(root / "model-00003-of-00003.safetensors", root / name)
    found = problems(root)
    assert any("A shard that the index does not name" in p and name in p for p in found)
    assert any("Held by two shards" in p for p in found)


def test_a_file_that_belongs_to_no_layout(root: Path) -> None:
    shutil.copy(root / "model-00003-of-00003.safetensors", root / "model-3.safetensors")
    refuses(root, UnreadableError, "no part of the checkpoint's layout", "model-3.safetensors")


def test_strange_names_of_files_are_shown_safely(root: Path) -> None:
    for name in (b"evil\x1b[2J.safetensors", b"\xff.safetensors", b"a\nb.safetensors"):
        with open(os.fsencode(root) + b"/" + name, "wb"):  # noqa: PTH123
            pass
    found = problems(root)
    assert len(found) == 3 and any("evil\\x1b[2J.safetensors" in p for p in found)


def test_folders_named_like_shards(root: Path) -> None:
    path = root / "model-00003-of-00003.safetensors"
    path.unlink()
    path.mkdir()
    refuses(root, UnreadableError, "Not a regular file", path.name)
    (root / INDEX).unlink()
    (root / INDEX).mkdir()
    refuses(root, UnreadableError, "Not a regular file", INDEX)


def test_pipes_and_sockets_named_like_shards_do_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    path = root / "model-00001-of-00003.safetensors"
    path.unlink()
    os.mkfifo(path)
    refuses(root, UnreadableError, "Not a regular file", path.name)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(root)  # a socket's path must be short
        server.bind(path.name)
        refuses(root, UnreadableError, "Not a regular file", path.name)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", INDEX, "config.json"])
def test_links_out_of_the_folder(root: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    (root / name).rename(secret)
    (root / name).symlink_to(secret)
    refuses(root, UnreadableError, "A symbolic link that leaves the folder", str(secret), name)


def test_links_to_nothing_and_in_circles(root: Path) -> None:
    path = root / "model-00001-of-00003.safetensors"
    path.unlink()
    path.symlink_to("nowhere")
    refuses(root, UnreadableError, "Not a regular file, or it is missing", path.name)
    path.unlink()
    path.symlink_to(path.name)
    refuses(root, UnreadableError, "Not a regular file, or it is missing", path.name)


def test_a_folder_that_is_a_link_out(tmp_path: Path, ranks: Ranks) -> None:
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, "fp4"), tmp_path / "mp"))
    (root / "config.json").unlink()
    (tmp_path / "outside").mkdir()
    shutil.copy(golden("tiny-fp4") / "config.json", tmp_path / "outside" / "config.json")
    (root / "inference").symlink_to(tmp_path / "outside")
    refuses(root, UnreadableError, "leaves the folder", "inference/config.json")


def test_links_of_a_false_hub_cache(tmp_path: Path) -> None:
    """A link may lead to a blob, but not to anything else that the cache holds, or beyond."""
    snapshot = hub_cache(golden("tiny-fp4"), tmp_path)
    link = snapshot / "model-00001-of-00003.safetensors"
    blob = link.resolve()
    for target in (tmp_path / "outside", blob.parent / "sub" / "blob"):
        target.parent.mkdir(exist_ok=True)
        shutil.copy(blob, target)
        link.unlink()
        link.symlink_to(target)
        refuses(snapshot, UnreadableError, "leaves the folder", link.name)
    blob.unlink()
    blob.symlink_to(tmp_path / "outside")  # the blob itself leads out
    link.unlink()
    link.symlink_to(blob)
    refuses(snapshot, UnreadableError, "leaves the folder", link.name)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated_shards(root: Path, size: int) -> None:
    path = root / "model-00002-of-00003.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    (problem,) = problems(root)
    assert path.name in problem
    refuses(root, HeaderError, path.name)


def test_grown_shards(root: Path) -> None:
    with (root / "model-00002-of-00003.safetensors").open("ab") as file:
        file.write(b"\0")
    refuses(root, HeaderError, "Something was appended", "model-00002-of-00003")


def test_missing_and_needless_ranks(tmp_path: Path, ranks: Ranks) -> None:
    root = Path(shutil.copytree(ranks("tiny-fp4", 4, "fp4"), tmp_path / "mp"))
    (root / "model2-mp4.safetensors").rename(root / "model4-mp4.safetensors")
    found = problems(root)
    assert any("Rank 2 of 4 is missing" in p and "model2-mp4" in p for p in found)
    assert any("A rank too many" in p and "model4-mp4" in p for p in found)
    assert len(found) == 2


def test_ranks_that_were_exchanged(tmp_path: Path, ranks: Ranks) -> None:
    """Experts are in the wrong file then: every one is named."""
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, "fp4"), tmp_path / "mp"))
    one, two = root / "model0-mp2.safetensors", root / "model1-mp2.safetensors"
    one.rename(root / "x")
    two.rename(one)
    (root / "x").rename(two)
    found = problems(root)
    assert sum("does not imply" in p for p in found) == 6 * 8 * 6
    assert sum("The tensor is missing" in p for p in found) == 6 * 8 * 6


# --- the index -----------------------------------------------------------------------------------


def test_no_index_for_several_shards(root: Path) -> None:
    (root / INDEX).unlink()
    refuses(root, UnreadableError, "missing", INDEX)


def test_the_index_names_another_shard(root: Path) -> None:
    name = "layers.0.attn.wq_a.weight"
    with edited_json(root / INDEX) as index:
        held = index["weight_map"][name]
        index["weight_map"][name] = said = "model-00003-of-00003.safetensors"
    found = problems(root)
    assert len(found) == 2 and all(name in p for p in found)
    assert any(f"The index says {said} holds it; it does not" in p for p in found)
    assert any(f"{held} holds it; the index says {said}" in p for p in found)


def test_the_index_misses_a_tensor_or_has_one_too_many(root: Path) -> None:
    with edited_json(root / INDEX) as index:
        weight_map = index["weight_map"]
        weight_map["layers.9.made.up"] = weight_map.pop("layers.0.attn.wq_a.scale")
    found = problems(root)
    assert any("the index says nothing" in p and "layers.0.attn.wq_a.scale" in p for p in found)
    assert any("it does not" in p and "layers.9.made.up" in p for p in found)


@pytest.mark.parametrize(
    "target",
    [
        "../model-00001-of-00003.safetensors", "/etc/passwd", "a/model-00001-of-00003.safetensors",
        "model-00001-of-00003.safetensors\0", "model-00001-of-00003.safetensors\n", "", ".", None,
        7, ["model-00001-of-00003.safetensors"], {"a": 1}, True, "pytorch_model.bin",
        "model0-mp2.safetensors", "model-٠٠٠٠١-of-00003.safetensors", "x" * 100_000,
        "model-1-of-3.safetensors", "\x1b[2J",
    ],
    ids=range(18),
)  # fmt: skip
def test_the_index_leads_elsewhere(root: Path, target: Any) -> None:
    with edited_json(root / INDEX) as index:
        index["weight_map"]["norm.weight"] = target
    refuses(root, IndexFileError, "not to a shard's name", INDEX, "norm.weight")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": null}', "no weight_map"),
        (b'{"weight_map": {"a": 1, "a": 1}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": 1}, "weight_map": {}}', "'weight_map' occurs twice"),
        (b'{"weight_map":' + b"[" * 100_000, "nested too deeply"),
        (b"\x80\x04\x95", "not valid JSON"),
        (b'{"weight_map": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", "not to a shard's name"),
        (b'{"weight_map": [' + b"[]," * 600_000 + b"0]}", "more than 500,000 values"),
        (b'{"weight_map": {"\\ud800": "x"}}', "surrogates"),
        (b"{}" + b" " * (32 << 20), "larger than 32 MiB"),
    ],
    ids=range(14),
)
def test_no_index(root: Path, text: bytes, says: str) -> None:
    (root / INDEX).write_bytes(text)
    start = time.process_time()
    refuses(root, IndexFileError, says, INDEX)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("metadata", [None, [], {}, {"total_size": "1"}, {"total_size": True}])
def test_an_index_without_total_size_says_nothing_of_it(root: Path, metadata: Any) -> None:
    with edited_json(root / INDEX) as index:
        index["metadata"] = metadata
    assert survey(root).total_size is None and problems(root) == []


def test_a_tensor_in_two_shards(root: Path) -> None:
    with edited_file(root / "model-00003-of-00003.safetensors") as tensors:
        tensors["embed.weight"] = read_file(shard_with(root, "embed.weight"))["embed.weight"]
    assert any("Held by two shards" in p and "embed.weight" in p for p in problems(root))


# --- tensors -------------------------------------------------------------------------------------


def test_lost_scales_and_weights(root: Path) -> None:
    for name in (f"{EXPERT}.scale", "layers.0.attn.wq_a.weight"):
        with edited_file(shard_with(root, name)) as tensors:
            del tensors[name]
        with edited_json(root / INDEX) as index:
            index["metadata"] = {}
            del index["weight_map"][name]
    found = problems(root)
    assert len(found) == 2 and all("The tensor is missing" in p for p in found)
    assert any(f"{EXPERT}.scale" in p for p in found)


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_a.weight_scale_inv", "layers.99.attn_norm.weight", "vision.x",
             "layers.0.ffn.experts.8.w1.weight", "mtp.0.head.weight", "norm.weight "],
)  # fmt: skip
def test_unknown_tensors(root: Path, name: str) -> None:
    path = root / "model-00002-of-00003.safetensors"
    with edited_file(path) as tensors:
        tensors[name] = ("F32", [1], bytes(4))
    with edited_json(root / INDEX) as index:
        index["weight_map"][name] = path.name
    refuses(root, CatalogueError, "A tensor that the config does not imply", name, path.name)


LIES: list[tuple[str, str, list[int], str]] = [
    ("layers.0.attn.wq_a.weight", "I8", [128, 256], "Expected F8_E4M3 [128, 256], found I8"),
    ("layers.0.attn.wq_a.weight", "F8_E4M3", [256, 128], "found F8_E4M3 [256, 128]"),
    ("layers.0.attn.wq_a.weight", "F8_E5M2", [128, 256], "found F8_E5M2 [128, 256]"),
    ("layers.0.attn.wq_a.weight", "F8_E4M3FNUZ", [128, 256], "found F8_E4M3FNUZ [128, 256]"),
    ("layers.0.attn.wq_a.weight", "BF16", [128, 128], "Expected F8_E4M3 [128, 256], found BF16"),
    ("layers.0.attn.wq_a.scale", "U8", [1, 2], "Expected F8_E8M0 [1, 2], found U8"),
    ("layers.0.attn.wq_a.scale", "F8_E8M0", [2], "found F8_E8M0 [2]"),
    (f"{EXPERT}.weight", "U8", [256, 64], "Expected I8 [256, 64], found U8 [256, 64]"),
    (f"{EXPERT}.weight", "F4", [256, 128], "Expected I8 [256, 64], found F4 [256, 128]"),
    (f"{EXPERT}.weight", "F8_E4M3", [256, 64], "found F8_E4M3 [256, 64]"),
    (f"{EXPERT}.scale", "F8_E8M0", [4, 256], "Expected F8_E8M0 [256, 4], found F8_E8M0 [4, 256]"),
    (f"{EXPERT}.scale", "F8_E4M3", [256, 4], "Expected F8_E8M0 [256, 4], found F8_E4M3"),
    ("layers.0.ffn.gate.tid2eid", "F64", [512, 2], "Expected I64 [512, 2], found F64"),
    ("layers.0.ffn.gate.tid2eid", "I32", [512, 4], "Expected I64 [512, 2], found I32 [512, 4]"),
    ("layers.0.attn.attn_sink", "I32", [8], "Expected F32 [8], found I32 [8]"),
    ("norm.weight", "F16", [256], "Expected BF16 [256], found F16 [256]"),
    ("norm.weight", "BF16", [1, 256], "Expected BF16 [256], found BF16 [1, 256]"),
    ("layers.0.hc_attn_fn", "BF16", [24, 2048], "Expected F32 [24, 1024], found BF16"),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "says"), LIES)
def test_a_header_that_lies_is_the_only_problem(
    root: Path, name: str, dtype: str, shape: list[int], says: str
) -> None:
    """Also where the liar is the first of its kind: the format is what most blocks show."""
    with edited_file(shard_with(root, name)) as tensors:
        tensors[name] = (dtype, shape, tensors[name][2])
    (problem,) = problems(root)
    assert says in problem and name in problem
    refuses(root, CatalogueError, says)


def test_the_first_expert_of_all_lies(root: Path) -> None:
    name = "layers.0.ffn.experts.0.w1.weight"
    with edited_file(shard_with(root, name)) as tensors:
        tensors[name] = ("BF16", [128, 64], tensors[name][2])
    (problem,) = problems(root)
    assert "Expected I8 [128, 128], found BF16 [128, 64]" in problem


def test_every_difference_is_reported(root: Path) -> None:
    with edited_file(root / "model-00002-of-00003.safetensors") as tensors:
        names = list(tensors)[:5]
        for name in names:
            tensors[name + "_"] = tensors.pop(name)
    found = problems(root)
    for name in names:
        assert any(f"tensor {name})" in p for p in found)
        assert any(f"tensor {name}_)" in p for p in found)
    with pytest.raises(UnreadableError, match=rf"{len(found) - 1} more problems; .* verify"):
        Checkpoint.open(root)


def test_i8_experts_in_rank_files(tmp_path: Path, ranks: Ranks) -> None:
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, "fp4"), tmp_path / "mp"))
    with edited_file(root / "model0-mp2.safetensors") as tensors:
        dtype, shape, data = tensors["layers.0.ffn.experts.0.w1.weight"]
        tensors["layers.0.ffn.experts.0.w1.weight"] = ("I8", [shape[0], shape[1] // 2], data)
    assert dtype == "F4"
    refuses(root, CatalogueError, "Expected F4 [128, 256], found I8 [128, 128]")


# --- the config against the files ----------------------------------------------------------------


def test_no_config(root: Path) -> None:
    (root / "config.json").unlink()
    refuses(root, UnreadableError, "missing", "config.json")


def test_a_broken_config(root: Path) -> None:
    (root / "config.json").write_text("{")
    refuses(root, ConfigError, "not valid JSON", "config.json")


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("tiny-fp4", {"expert_dtype": "fp8"}, "says expert_dtype fp8, the files hold fp4"),
        ("tiny-fp4", {"expert_dtype": "bf16"}, "says expert_dtype bf16, the files hold fp4"),
        ("tiny-base", {"expert_dtype": "fp4"}, "says expert_dtype fp4, the files hold fp8"),
        ("tiny-fp4", {"quantization_config": None},
         "says nothing of a quantization_config, the files hold fp4 and fp8"),
        ("tiny-fp4", {"quantization_config": {"weight_block_size": [32, 32]}},
         "says weight_block_size 32x32, the files hold 128x128"),
        ("tiny-base", {"quantization_config": {"weight_block_size": [64, 128]}},
         "says weight_block_size 64x128, the files hold 128x128"),
    ],
)  # fmt: skip
def test_contradictions_name_both_sides(
    tmp_path: Path, case: str, changes: dict[str, Any], says: str
) -> None:
    root = copy_of(case, tmp_path / "c")
    with edited_json(root / "config.json") as config:
        config |= changes
    (problem,) = problems(root)
    assert says in problem and "config.json" in problem
    refuses(root, ConfigError, says)


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_published_contradictions_are_accepted(tmp_path: Path, case: str) -> None:
    """The first revisions name no expert_dtype; -Base says ue8m0 over F32 scales."""
    root = copy_of(case, tmp_path / "c")
    with edited_json(root / "config.json") as config:
        assert config["quantization_config"]["scale_fmt"] == "ue8m0"
        del config["expert_dtype"]
    with Checkpoint.open(root) as checkpoint:
        assert str(checkpoint.catalogue.formats.experts) == (
            "fp4 1x32 e8m0" if case == "tiny-fp4" else "fp8 128x128 f32"
        )


DSPARK = {
    "compress_ratios": [0, 4, 128, 4, 0, 0, 0, 0], "dspark_target_layer_ids": [2, 3, 4],
    "dspark_markov_rank": 16, "dspark_block_size": 5, "dspark_noise_token_id": 1,
}  # fmt: skip


def write_from_catalogue(root: Path, changes: dict[str, Any]) -> None:
    """A checkpoint of zeros for a changed tiny config, in one file."""
    raw = json.loads((golden("tiny-fp4") / "config.json").read_bytes()) | changes
    config = parse_config(raw)
    root.mkdir()
    (root / "config.json").write_text(json.dumps(raw))
    write_file(
        root / "model.safetensors",
        {
            tensor.name: (tensor.dtype, list(tensor.shape), bytes(tensor.nbytes))
            for tensor in Catalogue(config, published_formats(config)).stored("hf")
        },
    )


def test_dspark_says_one_mtp_block_and_holds_three(tmp_path: Path) -> None:
    write_from_catalogue(tmp_path / "c", DSPARK)
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert checkpoint.config.num_nextn_predict_layers == 1
        assert "mtp.2.markov_head.markov_w1.weight" in checkpoint.specs
    with edited_file(tmp_path / "c" / "model.safetensors") as tensors:
        for name in [name for name in tensors if name.startswith("mtp.1.")]:
            del tensors[name]
    found = problems(tmp_path / "c")
    assert found and all("The tensor is missing" in p and "mtp.1." in p for p in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 6), ("num_hidden_layers", 4), ("n_routed_experts", 9),
        ("n_routed_experts", 7), ("hidden_size", 512), ("moe_intermediate_size", 256),
        ("vocab_size", 1024), ("num_attention_heads", 16), ("head_dim", 64), ("q_lora_rank", 256),
        ("o_groups", 2), ("o_lora_rank", 256), ("index_n_heads", 4), ("index_head_dim", 64),
        ("hc_mult", 2), ("num_hash_layers", 2), ("num_experts_per_tok", 3),
        ("n_shared_experts", 2), ("num_nextn_predict_layers", 0),
        ("compress_ratios", [0, 4, 4, 4, 0, 0]), ("compress_ratios", [0, 128, 4, 128, 0, 0]),
    ],
)  # fmt: skip
def test_every_field_that_shapes_a_tensor_is_held_against_the_files(
    root: Path, key: str, value: Any
) -> None:
    with edited_json(root / "config.json") as config:
        config[key] = value
        if key == "num_hidden_layers":
            config["compress_ratios"] = [*config["compress_ratios"][:5], 0, 0]
    refuses(root, CatalogueError)


# --- the flat dialect in rank folders ------------------------------------------------------------


def flat_config(root: Path, **changes: Any) -> None:
    """Replaces config.json by the inference/config.json of the published code."""
    from dsv4_quant.config import FLAT_KEYS, FLAT_ROPE_KEYS

    raw = json.loads((root / "config.json").read_bytes())
    flat = {short: raw[key] for short, key in FLAT_KEYS.items() if key in raw}
    flat |= {short: raw["rope_scaling"][key] for short, key in FLAT_ROPE_KEYS.items()}
    flat |= {"dtype": "fp8", "scale_fmt": "ue8m0"} | changes
    del flat["n_mtp_layers"], flat["norm_eps"], flat["hc_eps"]
    (root / "inference").mkdir()
    (root / "inference" / "config.json").write_text(
        json.dumps({key: value for key, value in flat.items() if value is not None})
    )
    (root / "config.json").unlink()


@pytest.mark.parametrize(("experts", "said"), [("fp4", "fp4"), ("fp8", None), ("fp8", "fp8")])
def test_the_published_inference_config_alone(
    tmp_path: Path, ranks: Ranks, experts: str, said: str | None
) -> None:
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, experts), tmp_path / "mp"))
    flat_config(root, expert_dtype=said)
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.config.is_flat
        assert checkpoint.catalogue.formats.experts.kind == experts


@pytest.mark.parametrize(
    ("experts", "changes", "says"),
    [
        ("fp4", {"expert_dtype": None}, "says nothing of an expert_dtype, the files hold fp4"),
        ("fp8", {"expert_dtype": "fp4"}, "says expert_dtype fp4, the files hold fp8"),
        ("fp8", {"dtype": "bf16"}, "says dtype bf16, the files hold fp8"),
    ],
)
def test_contradictions_of_the_inference_config(
    tmp_path: Path, ranks: Ranks, experts: str, changes: dict[str, Any], says: str
) -> None:
    root = Path(shutil.copytree(ranks("tiny-fp4", 2, experts), tmp_path / "mp"))
    flat_config(root, **({"expert_dtype": experts} | changes))
    (problem,) = problems(root)
    assert says in problem and "inference/config.json" in problem


def test_a_gpu_count_that_the_model_cannot_have(tmp_path: Path, ranks: Ranks) -> None:
    root = tmp_path / "mp"
    root.mkdir()
    for rank in range(3):
        shutil.copy(
            ranks("tiny-fp4", 2, "fp4") / "model0-mp2.safetensors",
            root / f"model{rank}-mp3.safetensors",
        )
    shutil.copy(golden("tiny-fp4") / "config.json", root)
    refuses(root, CatalogueError, "cannot be split over 3 GPUs", "Possible GPU counts: 1, 2, 4.")


# --- what a hostile folder may cost --------------------------------------------------------------


def test_thousands_of_rank_files_of_thousands_more(tmp_path: Path) -> None:
    for rank in range(4000):
        (tmp_path / f"model{rank}-mp99999.safetensors").touch()
    shutil.copy(golden("tiny-fp4") / "config.json", tmp_path)
    start = time.process_time()
    refuses(tmp_path, HeaderError, "more problems")
    assert time.process_time() - start < 5


def test_too_many_files(tmp_path: Path) -> None:
    for number in range(folder.MAX_FILES + 1):
        (tmp_path / f"{number}.safetensors").touch()
    refuses(tmp_path, UnreadableError, "8193 safetensors files")


def test_headers_are_bounded_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MAX_HEADER_BYTES", 10_000)
    refuses(root, UnreadableError, "together larger than 10,000 bytes")


def test_problems_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MAX_PROBLEMS", 10)
    with edited_json(root / "config.json") as config:
        config["n_routed_experts"] = 100
    found = problems(root)
    assert len(found) == 11 and "More problems than are worth listing" in found[-1]


def test_a_config_that_implies_half_a_million_tensors(root: Path) -> None:
    with edited_json(root / "config.json") as config:
        config["n_routed_experts"] = 13_000
    start = time.process_time()
    refuses(root, CatalogueError, "more problems")
    assert time.process_time() - start < 15


def test_an_index_that_lies_about_every_tensor(tmp_path: Path) -> None:
    """Comparing must not take the square of the tensors."""
    count = 20_000
    first, second = (f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    write_file(tmp_path / first, {f"t{k}": ("U8", [0], b"") for k in range(count)})
    write_file(tmp_path / second, {"u": ("U8", [0], b"")})
    weight_map = {f"t{k}": second for k in range(count)} | {"u": first}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(golden("tiny-fp4") / "config.json", tmp_path)
    start = time.process_time()
    refuses(tmp_path, IndexFileError, "more problems")
    assert time.process_time() - start < 5


# --- fuzz ----------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.text(max_size=4)
    | st.sampled_from(["model-00001-of-00003.safetensors", "norm.weight", "weight_map"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["weight_map", "metadata", "total_size", "norm.weight", "a"]), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz_index(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz-index"
    if not root.exists():
        copy_of("tiny-fp4", root)
    text = (golden("tiny-fp4") / INDEX).read_bytes()
    if data.draw(st.booleans()):
        at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 40))
        text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + cut :]
    else:
        text = json.dumps(data.draw(JSON)).encode()
    (root / INDEX).write_bytes(text)
    found = problems(root)
    if not found:  # as good as the golden one
        assert json.loads(text)["weight_map"] == survey(golden("tiny-fp4")).index
