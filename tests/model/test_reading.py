"""A pass reads every byte that it needs once, and no other; it says so, and reads ahead."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.model import Observer, Reading, Result, forward
from dsv4_quant.model.reading import Meter, side_by_side
from tests.folders import golden
from tests.model.random_model import MemorySource, random_source, tokens

Paint = dict[str, NDArray[np.uint8]]
"""Per file, how often each byte was read."""


class Painting(Checkpoint):
    """Counts at the system call how often every byte of every file is read, and by whom."""

    painted: Paint
    on_main: set[str]

    def begin(self) -> None:
        self.painted = {
            path.name: np.zeros(path.stat().st_size, np.uint8)
            for path in self.root.glob("*.safetensors")
        }
        self.on_main = set()

    def read_into(self, file: str, offset: int, out: NDArray[Any]) -> None:
        super().read_into(file, offset, out)
        self.painted[file][offset : offset + out.nbytes] += 1

    def read(self, name: str) -> Any:
        self._by(name)
        return super().read(name)

    def read_rows(self, name: str, start: int, stop: int, *, copies: bool = False) -> Any:
        self._by(name)
        return super().read_rows(name, start, stop, copies=copies)

    def _by(self, name: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self.on_main.add(name)


def needed(ckpt: Painting, prompts: list[list[int]], result: Result, *, mtp: bool) -> Paint:
    """1 where a byte is needed, by the headers alone; of equal copies the first rank's."""
    layers = ckpt.config.num_hidden_layers
    found = {file: np.zeros_like(counts) for file, counts in ckpt.painted.items()}
    for rank, file in enumerate(sorted(found)):
        raw = (ckpt.root / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            first, last = (start + at for at in entry["data_offsets"])
            spec = ckpt.specs[name.replace(".scale", ".weight") if ".scale" in name else name]
            is_copy = ckpt.layout == "mp" and rank > 0 and spec.split is None
            if is_copy or (name.startswith("mtp.") and not mtp):
                continue
            if spec.expert is not None and spec.expert not in result.experts_hit[spec.layer or 0]:
                continue
            if name != "embed.weight":
                found[file][first:last] = 1
                continue
            width = (last - first) // entry["shape"][0]
            here = rank * entry["shape"][0] if ckpt.layout == "mp" else 0
            for token in {token - here for prompt in prompts for token in prompt}:
                if 0 <= token < entry["shape"][0]:
                    found[file][first + token * width : first + (token + 1) * width] = 1
    assert len(result.experts_hit) == layers + mtp
    return found


@pytest.fixture(scope="module", params=["hf", "hf of FP8", "mp of 2", "mp of 4 in FP8"])
def ckpt(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Painting]:
    root = golden("tiny-base" if request.param == "hf of FP8" else "tiny-fp4")
    if request.param.startswith("mp"):
        root = tmp_path_factory.mktemp("ranks") / "out"
        asked = Request("mp", 2) if "2" in request.param else Request("mp", 4, "fp8")
        convert(golden("tiny-fp4"), root, asked, workers=1)
    with Painting.open(root) as opened:
        assert isinstance(opened, Painting)
        yield opened


@pytest.mark.parametrize(
    ("decode", "mtp", "keep"), [(0, False, True), (3, False, True), (0, True, False)]
)
def test_every_needed_byte_is_read_once(ckpt: Painting, decode: int, mtp: bool, keep: bool) -> None:
    prompts = [[5, 300, 5, 17], [3, 300]]
    ckpt.begin()
    result = forward(ckpt, prompts, decode=decode, mtp=mtp, keep_logits=keep)
    assert any(len(hit) < ckpt.config.n_routed_experts for hit in result.experts_hit)
    expected = needed(ckpt, prompts, result, mtp=mtp)
    for file, counts in ckpt.painted.items():
        assert np.array_equal(counts, expected[file]), file
    total = sum(int(counts.sum()) for counts in expected.values())
    assert result.reading.bytes_read == result.reading.bytes_needed == total
    assert 0 < result.reading.waited <= result.reading.seconds
    assert 0 < result.reading.busy <= result.reading.seconds


def test_all_but_the_embedding_is_announced(ckpt: Painting) -> None:
    """What is not announced is read while nothing is computed."""
    ckpt.begin()
    forward(ckpt, [[1, 2, 3]], mtp=True)
    assert ckpt.on_main == {"embed.weight"}


class Kept(Observer):
    """Keeps all logits, and how they came."""

    def __init__(self) -> None:
        self.rows: dict[tuple[bool, int], list[Tensor]] = {}
        self.read_so_far: list[int] = []
        self.pieces = 0

    def logits(self, prompt: int, first: int, rows: Tensor, *, mtp: bool) -> None:
        before = self.rows.setdefault((mtp, prompt), [])
        assert first == sum(map(len, before))
        before.append(rows.clone())
        self.pieces += 1

    def read(self, count: int) -> None:
        self.read_so_far.append(count)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return random_source(num_nextn_predict_layers=1, compress_ratios=[0, 4, 16, 4, 0])


@pytest.mark.parametrize(
    ("group", "pieces"), [(10 * 2 * 4 * 96, 2 * (3 + 2)), (1, 2 * 37), (1 << 20, 2 * 2)]
)
def test_logits_come_in_pieces_and_are_the_same(
    source: MemorySource, group: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of 37 positions and two heads are larger than the head; the third group of ten holds
    the end of the first prompt and the beginning of the second."""
    prompts = [tokens(source, 27), tokens(source, 10, seed=1)]
    whole = forward(source, prompts, mtp=True)
    assert whole.mtp_logits is not None
    monkeypatch.setattr("dsv4_quant.model.head.GROUP_BYTES", group)
    monkeypatch.setattr("dsv4_quant.model.head.HEAD_ROWS", 40)
    kept = Kept()
    result = forward(source, prompts, mtp=True, observer=kept, keep_logits=False)
    assert (result.logits, result.mtp_logits) == ([], [])
    assert kept.pieces == pieces
    for mtp, expected in ((False, whole.logits), (True, whole.mtp_logits)):
        for prompt, rows in enumerate(expected):
            assert torch.equal(torch.cat(kept.rows[mtp, prompt]), rows)
    assert kept.read_so_far == sorted(kept.read_so_far)
    assert kept.read_so_far[-1] == result.reading.bytes_read == result.reading.bytes_needed


def test_few_logits_are_handed_out_together(source: MemorySource) -> None:
    kept = Kept()
    result = forward(source, [tokens(source, 9)], observer=kept, keep_logits=False)
    assert kept.pieces == 1 and result.mtp_logits is None


def test_time_is_counted_once_however_many_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter()
    with meter.reading():  # from 0 to 4, another one from 1 to 2
        now[0] = 1
        with meter.reading():
            now[0] = 2
        meter.add(6)
        now[0] = 4
    now[0] = 10
    with meter.reading(), meter.waiting():
        now[0] = 11
    meter.add(4)
    reading = meter.summary(9, 12.0)
    assert reading == Reading(10, 9, 12.0, waited=1.0, busy=5.0)
    assert reading.rate == 2
    assert reading.to_json() == {
        "bytes_read": 10, "bytes_needed": 9, "seconds": 12.0, "waiting_seconds": 1.0,
        "reading_seconds": 5.0, "bytes_per_reading_second": 2,
        "device": "cpu",
    }  # fmt: skip
    assert side_by_side([reading, Reading(1, 1, 13.0, 0.5, 6.0)]) == Reading(11, 10, 13.0, 1.0, 6.0)
    other = Reading(1, 1, 13.0, 0.5, 6.0, device="NVIDIA X (cuda:1)")
    assert side_by_side([other, reading, other]).device == "NVIDIA X (cuda:1), cpu"
    assert Reading(0, 0, 1.0, 0.0, 0.0).rate == 0
