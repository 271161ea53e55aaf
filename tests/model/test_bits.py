"""Equal weights give bit-equal logits, whoever stores, shards, batches or threads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.model import batch, forward
from tests.folders import golden
from tests.model.random_model import random_source, tokens

LENGTHS = [1, 4, 17, 90]


def equal(found: list[torch.Tensor] | None, expected: list[torch.Tensor] | None) -> None:
    """Bit for bit: the sign of a zero counts, and nothing is NaN."""
    assert found is not None and expected is not None and len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all() and ours.shape == theirs.shape
        same = ours.view(torch.int32) == theirs.view(torch.int32)
        assert same.all(), f"prompt {number}, first at {(~same).nonzero()[0].tolist()}"


@pytest.fixture(scope="module")
def source() -> Any:
    return random_source(seed=1, index_n_heads=16)


@pytest.fixture(scope="module")
def prompts(source: Any) -> list[list[int]]:
    return [tokens(source, length, seed=length) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(source: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    return forward(source, prompts, threads=1).logits


def test_threads(source: Any, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    for threads in (2, 3):
        equal(forward(source, prompts, threads=threads).logits, expected)


@pytest.mark.parametrize("decode", [1, 2, 13, 1000])
def test_decoding_is_prefilling(
    source: Any, prompts: list[list[int]], expected: list[torch.Tensor], decode: int
) -> None:
    equal(forward(source, prompts, decode=decode).logits, expected)


def test_prompts_alone(source: Any, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    alone = [forward(source, [prompt]).logits[0] for prompt in prompts]
    equal(alone, expected)
    equal(forward(source, prompts[::-1]).logits, expected[::-1])


def test_what_follows_changes_nothing(
    source: Any, prompts: list[list[int]], expected: list[torch.Tensor]
) -> None:
    for length in (1, 3, 4, 16, 17, 63, 64, 89):
        equal(forward(source, [prompts[-1][:length]]).logits, [expected[-1][:length]])


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunks_of_a_prefill(
    source: Any,
    prompts: list[list[int]],
    expected: list[torch.Tensor],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dsv4_quant.model.batch.CHUNK", chunk)
    monkeypatch.setattr("dsv4_quant.model.block.CHUNK", chunk)
    assert len(list(batch.Batch(prompts, 0).chunks())) == -(-sum(LENGTHS) // chunk)
    equal(forward(source, prompts).logits, expected)


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_deployed_repeats_too(source: Any, prompts: list[list[int]], activations: Any) -> None:
    """Not promised between formats, but threads, batches and decode steps move nothing."""
    with Checkpoint.open(golden("tiny-fp4")) as ckpt:
        run: dict[str, Any] = {"arithmetic": "deployed", "activations": activations}
        given = [[token * 5 for token in prompt] for prompt in prompts]
        whole = forward(ckpt, given, threads=1, **run).logits
        equal(forward(ckpt, given, threads=2, decode=3, **run).logits, whole)
        equal(forward(ckpt, given[2:3], **run).logits, whole[2:3])


CONVERSIONS = {
    "tiny-fp4": [
        Request("mp", 1, "fp4"),
        Request("mp", 4, "fp4"),
        Request("mp", 2, "fp8"),
        Request("hf", 1, "fp8"),
        Request("hf", 1, "bf16"),
        Request("hf", 1, "bf16", "bf16"),
    ],
    "tiny-base": [Request("mp", 2, "keep"), Request("hf", 1, "bf16")],
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_layouts_formats_and_gpu_counts(case: str, tmp_path: Path) -> None:
    with Checkpoint.open(golden(case)) as ckpt:
        given = [tokens(ckpt, length, seed=length) for length in LENGTHS]
        expected = forward(ckpt, given, mtp=True)
    for number, request in enumerate(CONVERSIONS[case]):
        convert(golden(case), tmp_path / str(number), request)
        with Checkpoint.open(tmp_path / str(number)) as ckpt:
            found = forward(ckpt, given, mtp=True, threads=1 + number % 2)
        equal(found.logits, expected.logits)
        equal(found.mtp_logits, expected.mtp_logits)
        assert found.experts_hit == expected.experts_hit
