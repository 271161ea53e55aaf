"""What a calibrating pass leaves on disk, and what comes back by weight name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv4_quant.calibration import Calibration, collect
from dsv4_quant.calibration import inputs as inputs_module
from dsv4_quant.calibration.inputs import scratch_bytes
from dsv4_quant.errors import DiskSpaceError, NotANumberError, UsageError, WriteError
from dsv4_quant.formats.blocks import BF16, Tensor
from dsv4_quant.model import Observer, forward
from dsv4_quant.progress import NoProgress
from tests.model.random_model import MemorySource, random_source, tokens

LAYERS, EXPERTS = 4, 6


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return random_source()


@pytest.fixture(scope="module")
def prompts(source: MemorySource) -> list[list[int]]:
    return [tokens(source, 40, 1), tokens(source, 3, 2), tokens(source, 25, 3)]


@pytest.fixture(scope="module")
def made(
    source: MemorySource, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Calibration:
    return collect(source, prompts, tmp_path_factory.mktemp("calibration"))


class Memory(Observer):
    """Keeps what every expert is given, and the routes."""

    def __init__(self) -> None:
        self.given: dict[tuple[int, int], torch.Tensor] = {}
        self.hidden: dict[tuple[int, int], torch.Tensor] = {}
        self.rows: dict[tuple[int, int], torch.Tensor] = {}
        self.routes: dict[int, list[torch.Tensor]] = {}

    def expert_inputs(
        self,
        layer: int,
        expert: int,
        rows: torch.Tensor,
        given: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        self.rows[layer, expert] = rows.clone()
        self.given[layer, expert], self.hidden[layer, expert] = given.clone(), hidden.clone()

    def routed(self, layer: int, prompt: int, experts: torch.Tensor) -> None:
        self.routes.setdefault(layer, []).append(experts.clone())


def weight(layer: int, expert: int, w: str) -> str:
    return f"layers.{layer}.ffn.experts.{expert}.{w}.weight"


def test_an_observer_moves_no_bit_and_sees_what_the_experts_are_given(
    source: MemorySource, prompts: list[list[int]]
) -> None:
    """``hidden`` is w2's input: swiglu of ``given``, clamped, times the weight of the route."""
    seen, limit = Memory(), source.config.swiglu_limit
    watched, alone = forward(source, prompts, observer=seen), forward(source, prompts)
    for one, other in zip(watched.logits, alone.logits, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()
    for (layer, expert), given in seen.given.items():
        w1, w3 = (torch.from_numpy(source.tensors[weight(layer, expert, w)].decode())
                  for w in ("w1", "w3"))  # fmt: skip
        gate, up = (given @ w1.T).clamp_max(limit), (given @ w3.T).clamp(-limit, limit)
        plain = torch.nn.functional.silu(gate) * up
        by = (seen.hidden[layer, expert] * plain).sum(-1) / plain.square().sum(-1)  # [t]
        torch.testing.assert_close(
            seen.hidden[layer, expert], by[:, None] * plain, rtol=1e-3, atol=1e-5
        )
        assert ((by > 0) & (by <= source.config.routed_scaling_factor + 1e-3)).all()
        routes = torch.cat(seen.routes[layer])
        assert seen.rows[layer, expert].sort().values.tolist() == (
            (routes == expert).nonzero()[:, 0].tolist()
        )


def test_the_files_hold_them_in_the_order_of_the_tokens(
    source: MemorySource, prompts: list[list[int]], made: Calibration
) -> None:
    seen, ids = Memory(), np.concatenate(prompts)
    forward(source, prompts, observer=seen)
    assert len(seen.given) > 2 * EXPERTS
    for (layer, expert), given in seen.given.items():
        order = seen.rows[layer, expert].argsort(stable=True)
        for w, values in (("w1", given), ("w3", given), ("w2", seen.hidden[layer, expert])):
            name = weight(layer, expert, w)
            expected = values[order].numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
            found = made.inputs(name)
            assert (found.dtype, found.shape) == (np.float32, expected.shape)
            assert found.tobytes() == expected.tobytes()
            assert made.tokens(name).tolist() == ids[seen.rows[layer, expert][order]].tolist()


def test_weights_that_no_prompt_reached(source: MemorySource, tmp_path: Path) -> None:
    """One token goes to two experts of six, in every layer."""
    made = collect(source, [[5]], tmp_path)
    reach = made.reach()
    assert (reach.experts, reach.unreached, reach.median_tokens) == (24, 16, 0)
    counts = [len(made.inputs(weight(0, e, "w1"))) for e in range(EXPERTS)]
    assert sorted(counts) == [0, 0, 0, 0, 1, 1]
    unreached = weight(0, counts.index(0), "w2")
    assert made.inputs(unreached).shape == (0, source.config.moe_intermediate_size)
    assert made.tokens(unreached).shape == (0,)
    assert made.factor(unreached) is None


def test_other_weights_are_not_calibrated(made: Calibration) -> None:
    for name in ("layers.1.attn.wq_a.weight", "layers.1.ffn.shared_experts.w1.weight",
                 "layers.1.ffn.gate.weight", "embed.weight"):  # fmt: skip
        assert len(made.inputs(name)) == 0 and made.factor(name) is None


def test_of_very_many_inputs_every_kth_is_used(
    made: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = weight(1, 0, "w2")
    everything, ids = made.inputs(name), made.tokens(name)
    assert len(everything) > 7
    monkeypatch.setattr(inputs_module, "MOST_INPUTS", 7)
    step = -(-len(everything) // 7)
    assert made.inputs(name).tobytes() == everything[::step].tobytes()
    assert made.tokens(name).tolist() == ids[::step].tolist()


def test_another_cut_into_prompts_is_another_calibration(made: Calibration) -> None:
    def of(prompts: list[list[int]]) -> Calibration:
        return Calibration(made._folder, made._specs, made._places, prompts)

    assert of([[1, 2], [3]]).identity == of([[1, 2], [3]]).identity
    assert len({of(p).identity for p in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]])}) == 3
    said = made.describe()
    assert (said["prompts"], said["tokens"], said["experts"]) == (3, 68, LAYERS * EXPERTS)
    assert said["unreached"] == made.reach().unreached and said["identity"] == made.identity


def test_a_factor_is_made_once(made: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """For w1 and w3, and for all who ask at the same time; the oldest are forgotten."""
    calls = []

    def stand_in(x: object, ids: object) -> SimpleNamespace:
        calls.append(x)
        return SimpleNamespace()

    monkeypatch.setattr(inputs_module, "factor", stand_in)
    monkeypatch.setattr(inputs_module, "LEAST_INPUTS", 0)
    fresh = Calibration(made._folder, made._specs, made._places, made._prompts)
    names = [weight(1, 0, w) for w in ("w1", "w3", "w2")] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fresh.factor, names))
    assert len(calls) == 2 and len({id(one) for one in found}) == 2
    assert found[0] is found[1] is not found[2]
    for layer in (2, 3):
        for expert in range(EXPERTS):
            fresh.factor(weight(layer, expert, "w1"))
    before = len(calls)
    assert fresh.factor(names[0]) is not found[0] and len(calls) == before + 1


def test_the_mtp_block_is_calibrated_too(tmp_path: Path) -> None:
    source = random_source(num_nextn_predict_layers=1, compress_ratios=[0, 4, 16, 4, 0])
    made = collect(source, [tokens(source, 30)], tmp_path)
    assert made.reach().experts == (LAYERS + 1) * EXPERTS
    counts = [len(made.inputs(f"mtp.0.ffn.experts.{e}.w1.weight")) for e in range(EXPERTS)]
    assert sum(counts) == 30 * 2
    used = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert used == scratch_bytes(source.config, 30)


def test_too_little_room_is_said_before_the_work(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = scratch_bytes(source.config, 2) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    source.reads.clear()
    with pytest.raises(DiskSpaceError, match="2 tokens"):
        collect(source, [[1, 2]], tmp_path)
    assert not source.reads and not list(tmp_path.iterdir())


def test_a_refused_write_is_named(source: MemorySource, tmp_path: Path) -> None:
    (tmp_path / "layer-0.rows").mkdir()
    with pytest.raises(WriteError):
        collect(source, [[1, 2]], tmp_path)


def test_inputs_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    source = random_source()
    shape = source.tensors["layers.1.ffn_norm.weight"].shape
    source.tensors["layers.1.ffn_norm.weight"] = Tensor(BF16, shape, np.full(shape, 0x7F80, "<u2"))
    with pytest.raises(NotANumberError, match="of layer 1"):
        collect(source, [[1, 2]], tmp_path)


def test_prompts_are_checked_as_by_forward(source: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        collect(source, [[10**6]], tmp_path)


def test_progress_is_told(source: MemorySource, tmp_path: Path) -> None:
    class Told(NoProgress):
        counts: list[int] = []  # noqa: RUF012

        def advance(self, count: int) -> None:
            self.counts.append(count)

    collect(source, [[1, 2]], tmp_path, progress=Told())
    assert sum(Told.counts) == LAYERS + 1


def test_a_few_inputs_are_not_believed(made: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a factor's, nor as its judge; and the judge's are never the factor's."""
    name = weight(1, 0, "w1")
    inputs = made.inputs(name)
    assert 4 <= len(inputs) < inputs_module.LEAST_INPUTS and made.factor(name) is None
    seen: list[NDArray[np.float32]] = []
    monkeypatch.setattr(inputs_module, "factor", lambda x, ids: seen.append(x))
    monkeypatch.setattr(inputs_module, "LEAST_INPUTS", len(inputs))
    Calibration(made._folder, made._specs, made._places, made._prompts).factor(name)
    held = made.held_out(name)
    assert np.array_equal(np.concatenate([seen[0], held]), inputs) and len(held) == len(inputs) // 4


@pytest.mark.parametrize("threads", [1, 2, 64, 1000])
def test_factors_keep_to_their_memory(made: Calibration, threads: int) -> None:
    """However many threads there are: more only where memory is for them."""
    alone = made.reserve(0, threads)
    assert made.reserve(alone, threads) == alone
    assert made.reserve(1 << 40, 1) == alone
    for most in (2 * alone, 10 * alone, 100 * alone):
        assert made.reserve(most, threads) <= most
    if threads > 1:
        assert made.reserve(100 * alone, threads) > alone
