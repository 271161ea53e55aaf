"""Rank files to other rank files and back to one checkpoint: never a value changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import UnreadableError
from tests.conversion.checkpoints import (
    config,
    digests,
    formats,
    tree,
    whole_digest,
    wild,
    write_checkpoint,
)
from tests.folders import golden
from tests.oracle import published_converter

CASES = ("tiny-fp4", "tiny-base")


def weights(root: Path) -> dict[str, str]:
    return {name: sha for name, sha in tree(root).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module", params=CASES)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """The golden checkpoint for 1, 2 and 4 GPUs; 0 is the checkpoint itself."""
    root = tmp_path_factory.mktemp("ranks")
    made = {0: golden(request.param)}
    for gpus in (1, 2, 4):
        convert(made[0], root / f"mp{gpus}", Request("mp", gpus))
        made[gpus] = root / f"mp{gpus}"
    return made


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 1), (4, 2), (2, 4)])
def test_other_rank_files_are_those_made_at_once(
    before: int, after: int, ranks: dict[int, Path], tmp_path: Path
) -> None:
    report = convert(ranks[before], tmp_path / "out", Request("mp", after))
    assert weights(tmp_path / "out") == weights(ranks[after])
    assert report.manifest.value_digest == whole_digest(ranks[0])
    for name in ("config.json", "inference/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (ranks[after] / name).read_bytes()


@pytest.mark.parametrize("gpus", [1, 4])
def test_back_to_hf_gives_the_bytes_of_the_way_that_never_left_it(
    gpus: int, ranks: dict[int, Path], tmp_path: Path
) -> None:
    """wo_a too, which was BF16 meanwhile: its tiles were filled, so there is one way to spell them.

    Only the manifest differs, which names the source and the proofs.
    """
    back, straight = tmp_path / "back", tmp_path / "straight"
    convert(ranks[gpus], back, Request("hf"))
    convert(ranks[0], straight, Request("hf"))
    assert digests(back) == digests(ranks[0])
    apart = {MANIFEST, SUMS, "inference/config.json"}
    assert {n: sha for n, sha in tree(back).items() if n not in apart} == {
        n: sha for n, sha in tree(straight).items() if n not in apart
    }


def test_a_wo_a_that_leaves_its_tiles_half_empty_comes_back_spelt_otherwise(
    tmp_path: Path,
) -> None:
    """Codes and scales are then the canonical ones; the values are the same, and all others."""

    def values(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        return wild(tensor, rng) & 0x9F if tensor.name.endswith("wo_a.weight") else None

    source = write_checkpoint(tmp_path / "src", config(), values=values)
    convert(source, tmp_path / "ranks", Request("mp", 2))
    convert(tmp_path / "ranks", tmp_path / "back", Request("hf"))
    assert digests(tmp_path / "back") == digests(source)
    differing = set()
    with Checkpoint.open(tmp_path / "back") as ours, Checkpoint.open(source) as theirs:
        for name in ours.specs:
            a, b = ours.read(name), theirs.read(name)
            if a.codes.tobytes() != b.codes.tobytes():
                differing.add(name.split(".", 2)[-1])
    assert differing == {"attn.wo_a.weight"}


def test_there_and_back_again_is_a_fixed_point(ranks: dict[int, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    convert(ranks[2], first, Request("hf"))
    convert(first, tmp_path / "ranks", Request("mp", 4))
    assert weights(tmp_path / "ranks") == weights(ranks[4])
    convert(tmp_path / "ranks", second, Request("hf"))
    assert tree(first).items() >= weights(second).items()


def test_a_checkpoint_in_its_own_form_keeps_every_byte_of_its_tensors(
    ranks: dict[int, Path], tmp_path: Path
) -> None:
    convert(ranks[0], tmp_path / "out", Request("hf"))
    with Checkpoint.open(tmp_path / "out") as ours, Checkpoint.open(ranks[0]) as theirs:
        for name in ours.specs:
            a, b = ours.read(name), theirs.read(name)
            assert a.codes.tobytes() == b.codes.tobytes()
            assert a.scales is None or (b.scales is not None and (a.scales == b.scales).all())


@pytest.mark.parametrize("flat", ["config.json", "inference/config.json"])
@pytest.mark.parametrize("dtype", ["fp4", "fp8"])
def test_what_the_published_converter_wrote(flat: str, dtype: str, tmp_path: Path) -> None:
    """Rank files, tokenizer, and the flat config of the published inference code; no more."""
    source = write_checkpoint(tmp_path / "src", config(), seed=5)
    (source / "tokenizer.json").write_text('{"t": 1}')
    published_converter.convert(source, tmp_path / "theirs", 2, dtype)
    convert(source, tmp_path / "ours", Request("mp", 2, "fp8" if dtype == "fp8" else "keep"))
    (tmp_path / "theirs" / flat).parent.mkdir(exist_ok=True)
    shutil.copyfile(tmp_path / "ours" / "inference" / "config.json", tmp_path / "theirs" / flat)
    convert(tmp_path / "theirs", tmp_path / "back", Request("hf"))
    assert digests(tmp_path / "back") == digests(source)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"t": 1}'
    said = json.loads((tmp_path / "back" / "config.json").read_bytes())
    meant = json.loads((source / "config.json").read_bytes()) | {"expert_dtype": dtype}
    for key in ("transformers_version",):  # the flat config knows nothing of it
        meant.pop(key)
    assert said == meant


def test_dspark_there_and_back(tmp_path: Path) -> None:
    raw = config(
        num_hidden_layers=2,
        compress_ratios=[4, 128, 0, 0, 0],
        dspark_target_layer_ids=[0, 1],
        dspark_markov_rank=64,
        dspark_block_size=5,
        dspark_noise_token_id=7,
    )
    source = write_checkpoint(tmp_path / "src", raw)
    convert(source, tmp_path / "ranks", Request("mp", 2))
    convert(tmp_path / "ranks", tmp_path / "back", Request("hf"))
    assert digests(tmp_path / "back") == digests(source)
    assert json.loads((tmp_path / "back" / "config.json").read_bytes()) == raw
    (tmp_path / "ranks" / "config.json").unlink()
    convert(tmp_path / "ranks", tmp_path / "flat", Request("hf"))
    assert weights(tmp_path / "flat") == weights(tmp_path / "back")


@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_other_experts_there_and_back(experts: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", config(expert_dtype=experts), formats(experts))
    convert(source, tmp_path / "ranks", Request("mp", 2))
    convert(tmp_path / "ranks", tmp_path / "back", Request("hf"))
    assert digests(tmp_path / "back") == digests(source)
    raw = json.loads((tmp_path / "back" / "config.json").read_bytes())
    assert raw.get("expert_dtype") == {"fp8": "fp8", "bf16": None}[experts]


def test_all_bf16_there_and_back(tmp_path: Path) -> None:
    raw = config(quantization_config=None, expert_dtype=None)
    source = write_checkpoint(tmp_path / "src", raw, formats("bf16", "bf16"))
    convert(source, tmp_path / "ranks", Request("mp", 2))
    convert(tmp_path / "ranks", tmp_path / "back", Request("hf"))
    assert digests(tmp_path / "back") == digests(source)
    assert json.loads((tmp_path / "back" / "config.json").read_bytes()) == raw
    (tmp_path / "ranks" / "config.json").unlink()
    convert(tmp_path / "ranks", tmp_path / "flat", Request("mp", 1))
    assert whole_digest(tmp_path / "flat") == whole_digest(source)


@pytest.mark.parametrize("damage", ["lost", "another count", "cut"])
def test_rank_files_that_do_not_fit_together(
    damage: str, ranks: dict[int, Path], tmp_path: Path
) -> None:
    src = Path(shutil.copytree(ranks[2], tmp_path / "src"))
    if damage == "lost":
        (src / "model1-mp2.safetensors").unlink()
    elif damage == "another count":
        shutil.copyfile(ranks[4] / "model2-mp4.safetensors", src / "model2-mp4.safetensors")
    else:
        with (src / "model1-mp2.safetensors").open("r+b") as file:
            file.truncate(100_000)
    with pytest.raises(UnreadableError):
        convert(src, tmp_path / "out", Request("mp", 1))
    assert not (tmp_path / "out").exists()


def test_another_hash_of_the_files_makes_another_list_and_the_same_weights(tmp_path: Path) -> None:
    from blake3 import blake3

    for kind in ("sha256", "blake3"):
        convert(golden("tiny-fp4"), tmp_path / kind, Request("mp", 2, sums=kind))  # type: ignore[arg-type]
    plain, fast = tree(tmp_path / "sha256"), tree(tmp_path / "blake3")
    signs = {"SHA256SUMS", "B3SUMS", "dsv4-manifest.json"}
    assert {k: v for k, v in plain.items() if k not in signs} == {
        k: v for k, v in fast.items() if k not in signs
    }
    assert "SHA256SUMS" not in fast and "B3SUMS" not in plain
    for line in (tmp_path / "blake3" / "B3SUMS").read_text().splitlines():
        stated, _, name = line.partition("  ")
        assert blake3((tmp_path / "blake3" / name).read_bytes()).hexdigest() == stated
