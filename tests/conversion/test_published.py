"""mp output is, byte for byte, what the published converter writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from tests.conversion.checkpoints import config, formats, whole_digest, wild, write_checkpoint
from tests.folders import GOLDEN, golden
from tests.oracle import published_converter

EXPECTED = {
    case: json.loads((GOLDEN / case / "expected.json").read_bytes())["converter"]
    for case in ("tiny-fp4", "tiny-base")
}


@pytest.mark.parametrize(
    ("case", "job"), [(c, job) for c, jobs in EXPECTED.items() for job in jobs]
)
def test_golden_files_have_the_published_sha256(case: str, job: str, tmp_path: Path) -> None:
    gpus, dtype = job.removeprefix("mp").split("-")
    experts: Any = "keep" if case == "tiny-base" else dtype
    report = convert(golden(case), tmp_path / "out", Request("mp", int(gpus), experts))
    found = {
        name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        for name in EXPECTED[case][job]
    }
    assert found == EXPECTED[case][job]
    assert {n: report.manifest.files[n].sha256 for n in found} == found
    assert report.manifest.value_digest == whole_digest(golden(case))


DSPARK = {
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0, 0, 0],
    "dspark_target_layer_ids": [0, 1, 2],
    "dspark_markov_rank": 64,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 7,
}
SHAPES: dict[str, dict[str, Any]] = {
    "thirds": {
        "n_routed_experts": 6,
        "num_attention_heads": 6,
        "head_dim": 128,
        "o_groups": 3,
        "index_n_heads": 6,
        "vocab_size": 384,
        "hidden_size": 384,
    },
    "twelve-experts": {
        "n_routed_experts": 12,
        "num_attention_heads": 8,
        "o_groups": 4,
        "o_lora_rank": 256,
        "index_n_heads": 8,
        "q_lora_rank": 384,
        "num_experts_per_tok": 3,
    },
    "many-tiles": {"hidden_size": 256, "moe_intermediate_size": 384, "n_shared_experts": 2},
    "dspark": DSPARK,
    "no-mtp": {"num_nextn_predict_layers": 0, "compress_ratios": [128, 4]},
    "plain-layers": {"compress_ratios": [0, 0, 0], "num_hash_layers": 0},
    "only-hash-layers": {"num_hash_layers": 2, "hc_mult": 2},
    "two-mtp-blocks": {"num_nextn_predict_layers": 2, "compress_ratios": [4, 4, 0, 0]},
}


def same_as_published(
    source: Path, tmp_path: Path, gpus: int, experts: str, dtype: str | None
) -> None:
    theirs, ours = tmp_path / f"theirs-{gpus}-{dtype}", tmp_path / f"ours-{gpus}-{dtype}"
    published_converter.convert(source, theirs, gpus, dtype)
    request: Any = Request("mp", gpus, experts)  # type: ignore[arg-type]
    report = convert(source, ours, request, workers=2)
    expected = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.glob("*.safetensors")) == expected
    for name in expected:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert report.manifest.value_digest == whole_digest(source)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_give_the_published_bytes(shape: str, tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "src",
        config(**SHAPES[shape]),
        seed=len(shape),
        shard=lambda tensor: -1 if tensor.spec.layer is None else tensor.spec.layer,
    )
    for gpus in (1, 3) if shape == "thirds" else (1, 2):
        same_as_published(source, tmp_path, gpus, "keep", None)
        same_as_published(source, tmp_path, gpus, "fp8", "fp8")


def test_four_gpus_and_scattered_shards(tmp_path: Path) -> None:
    raw = config(**SHAPES["twelve-experts"])
    source = write_checkpoint(
        tmp_path / "src", raw, seed=4, shard=lambda tensor: hash_of(tensor.name) % 7
    )
    same_as_published(source, tmp_path, 4, "fp8", "fp8")


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


@pytest.mark.parametrize("experts", ["fp8", "bf16"])
def test_experts_that_are_not_fp4_pass_through(experts: str, tmp_path: Path) -> None:
    raw = config(expert_dtype=experts)
    source = write_checkpoint(tmp_path / "src", raw, formats(experts))
    same_as_published(source, tmp_path, 2, "keep", "fp8")


def test_f32_scales_pass_through_and_need_not_be_powers_of_two(tmp_path: Path) -> None:
    def values(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        if tensor.is_scale and "wo_a" not in tensor.name:
            return rng.random(tensor.shape).astype(np.float32) + np.float32(0.1)
        return wild(tensor, rng)

    raw = config(expert_dtype="fp8")
    source = write_checkpoint(tmp_path / "src", raw, formats("fp8", scale="f32"), values=values)
    same_as_published(source, tmp_path, 2, "keep", "fp8")
