"""forward: what it refuses, what it tells, what it reads."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dsv4_quant.config import parse_config
from dsv4_quant.errors import UsageError
from dsv4_quant.model import Observer, forward
from dsv4_quant.model.observer import Part
from dsv4_quant.model.weights import Reader, Weights
from tests.folders import GOLDEN
from tests.model.random_model import BASE, MemorySource, random_source, tokens


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return random_source(num_nextn_predict_layers=1, compress_ratios=[0, 4, 16, 4, 0])


class Diary(Observer):
    """Writes down everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Part, int]] = []
        self.last: dict[int, Tensor] = {}
        self.experts: dict[tuple[int, int], Tensor] = {}
        self.steps: list[tuple[int, int]] = []

    def streams(self, layer: int, part: Part, prompt: int, h: Tensor) -> None:
        self.seen.append((layer, part, prompt))
        self.last[prompt] = h.clone()

    def routed(self, layer: int, prompt: int, experts: Tensor) -> None:
        self.experts[layer, prompt] = experts.clone()

    def finished(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_an_observer_sees_every_sub_layer(source: MemorySource) -> None:
    prompts, diary = [tokens(source, 5), tokens(source, 9, seed=1)], Diary()
    result = forward(source, prompts, observer=diary, mtp=True)
    assert diary.seen == [
        (layer, part, prompt) for layer in range(5) for part in ("attn", "ffn") for prompt in (0, 1)
    ]
    assert [h.shape for h in diary.last.values()] == [(5, 4, 64), (9, 4, 64)]
    assert diary.steps == [(step, 6) for step in range(1, 7)]
    hit = [
        sorted({e for p in (0, 1) for e in diary.experts[layer, p].flatten().tolist()})
        for layer in range(5)
    ]
    assert result.experts_hit == hit and diary.experts[0, 1].shape == (9, 2)
    assert [x.shape for x in result.logits] == [(5, 96), (9, 96)]
    assert result.mtp_logits is not None and result.mtp_logits[1].shape == (9, 96)


@pytest.mark.parametrize("arithmetic", ["exact", "deployed"])
def test_bfloat16_activations_are_what_bfloat16_holds(
    source: MemorySource, arithmetic: Literal["exact", "deployed"]
) -> None:
    prompt, diary = tokens(source, 40), Diary()
    rounded = forward(
        source, [prompt], arithmetic=arithmetic, activations="bfloat16", observer=diary
    ).logits[0]
    assert torch.equal(diary.last[0].bfloat16().float(), diary.last[0])
    plain = forward(source, [prompt]).logits[0]
    assert 0 < (rounded - plain).abs().mean() < 0.3, "another arithmetic of the same model"


def test_hash_layers_go_by_the_table(source: MemorySource) -> None:
    prompt, diary = tokens(source, 30), Diary()
    forward(source, [prompt], observer=diary)
    table = source.tensors["layers.0.ffn.gate.tid2eid"].codes
    assert diary.experts[0, 0].tolist() == table[prompt].tolist()


def test_every_tensor_is_read_once_and_only_the_experts_hit(source: MemorySource) -> None:
    source.reads.clear()
    result = forward(source, [tokens(source, 3)], decode=2)
    assert len(set(source.reads)) == len(source.reads)
    experts = {
        (int(name.split(".")[1]), int(name.split(".")[4]))
        for name in source.reads
        if ".experts." in name
    }
    assert experts == {(layer, e) for layer, hit in enumerate(result.experts_hit) for e in hit}
    assert not any(name.startswith("mtp.") for name in source.reads)
    top = {"embed.weight", "head.weight"}
    assert not top & set(source.reads), "these two are read in pieces"


def test_reading_ahead_stops_at_its_budget(
    source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "layers.{}.attn.wq_b.weight"
    size = source.tensors[name.format(0)].codes.nbytes
    monkeypatch.setattr("dsv4_quant.model.weights.AHEAD_BYTES", 2 * size)
    source.reads.clear()
    with Reader(source) as reader:
        reader.announce(name.format(layer) for layer in range(4))
        weights = Weights(reader)
        assert weights.matrix(name.format(3)) is source.tensors[name.format(3)], "out of turn"
        assert weights.matrix(name.format(0)) is source.tensors[name.format(0)]
        weights.matrix(name.format(1)), weights.matrix(name.format(2))
        assert len(source.reads) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[1, 96]], {}, "Prompt 0 holds token id 96; the vocabulary ends at 95"),
        ([[1], [-1]], {}, "Prompt 1 holds token id -1"),
        ([[1], []], {}, "at least one token"),
        ([], {}, "at least one token"),
        ([[1]], {"decode": -1}, "decode"),
        ([[1]], {"threads": 0}, "threads"),
        ([[1]], {"arithmetic": "fast"}, "fast"),
        ([[1]], {"activations": "float16"}, "float16"),
    ],
)
def test_impossible_requests(
    source: MemorySource, prompts: list[list[int]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        forward(source, prompts, **options)


def test_index_heads_that_cannot_be_rotated() -> None:
    with pytest.raises(UsageError, match="power of two"):
        forward(random_source(index_head_dim=24), [[1]])


def test_dspark_drafters_are_not_described() -> None:
    raw = json.loads((GOLDEN.parent / "configs" / "V4-Flash-0731.json").read_bytes())
    source = MemorySource(parse_config(raw), {})
    with pytest.raises(UsageError, match="DSpark"):
        forward(source, [[1]], mtp=True)


@pytest.mark.parametrize("blocks", [0, 2])
def test_only_one_mtp_block_is_described(blocks: int) -> None:
    ratios = BASE["compress_ratios"] + [0] * blocks
    source = random_source(num_nextn_predict_layers=blocks, compress_ratios=ratios)
    with pytest.raises(UsageError, match=f"has {blocks}"):
        forward(source, [[1]], mtp=True)
    assert forward(source, [[1]]).mtp_logits is None


def test_threads_of_torch_are_left_as_they_were(source: MemorySource) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        forward(source, [[1]], observer=Breaks())
    assert torch.get_num_threads() == before


class Breaks(Observer):
    """Raises at the first chance."""

    def finished(self, done: int, total: int) -> None:
        raise ZeroDivisionError
