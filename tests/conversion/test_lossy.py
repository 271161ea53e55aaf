"""``--lossy``: rounding as the kernels define it, counted, and nothing changed that need not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint.manifest import MANIFEST, read_manifest
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import ConvertReport, convert
from dsv4_quant.errors import NotANumberError, ValueNotExactError
from dsv4_quant.formats import e8m0
from dsv4_quant.formats.blocks import Tensor
from dsv4_quant.formats.cost import Cost
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.quantise_fp4_torch import quantise_fp4
from dsv4_quant.kernels.quantise_fp8_torch import quantise_fp8
from dsv4_quant.kernels.quantised_torch import statistics
from dsv4_quant.validators.verify import verify
from tests.conversion.checkpoints import config, formats, tree, write_checkpoint
from tests.conversion.conftest import Outcome

ONE = {
    "num_hidden_layers": 1,
    "compress_ratios": [4],
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 2,
}
SOURCES = {
    "fp8": formats("fp8"),
    "fp8-f32": formats("fp8", "fp8", "f32"),
    "bf16": formats("bf16", "bf16"),
}


def ordinary(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
    """Weights as training leaves them, with a few large ones; scales that fit."""
    if tensor.spec.kind == "fixed":
        return None
    if tensor.dtype == "F32":
        return rng.uniform(0.5, 2, tensor.shape).astype(np.float32) * np.float32(2**-9)
    if tensor.is_scale:
        return rng.integers(115, 122, tensor.shape, dtype=np.uint8)
    if tensor.dtype == "F8_E4M3":
        codes = rng.integers(0, 256, tensor.shape, dtype=np.uint8)
        return np.where(codes & 0x7F == 0x7F, codes ^ 1, codes)
    if tensor.dtype == "BF16":
        values = rng.standard_normal(tensor.shape) * 0.02
        values[rng.random(tensor.shape) < 1e-3] *= 50
        values[:, :32] = 0
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lossy")
    found = {}
    for name, held in SOURCES.items():
        dtype = {} if name != "bf16" else {"quantization_config": None, "expert_dtype": None}
        raw = config(**ONE, **dtype) if name == "bf16" else config(**ONE, expert_dtype="fp8")
        found[name] = write_checkpoint(root / name, raw, held, values=ordinary)
    return found


def expected(before: Tensor, after: Tensor, rule: ScaleRule) -> tuple[NDArray[Any], Any, Cost]:
    """By the definition in torch."""
    values = torch.from_numpy(before.decode())
    if after.format.kind == "fp4":
        made = quantise_fp4(values, rule)
    else:
        made = quantise_fp8(values, rule, after.format.block)
    (cost,) = statistics(made, values.numel())
    return made.codes.numpy(), made.scales.numpy(), cost


@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize(
    ("name", "experts", "dense"),
    [
        ("fp8", "fp4", "keep"),
        ("fp8-f32", "fp4", "keep"),
        ("bf16", "fp4", "fp8"),
        ("bf16", "fp8", "fp8"),
        ("bf16", "fp8", "keep"),
    ],
)
def test_codes_scales_and_costs_are_the_definition_s(
    name: str, experts: Any, dense: Any, rule: ScaleRule, sources: dict[str, Path], tmp_path: Path
) -> None:
    request = Request("hf", 1, experts, dense, lossy=True, rule=rule)
    report = convert(sources[name], tmp_path / "out", request)
    told = report.manifest.requantised
    assert told is not None and told.rule == rule.value
    seen = 0
    with Checkpoint.open(sources[name]) as before, Checkpoint.open(tmp_path / "out") as after:
        for weight, spec in after.specs.items():
            if spec.format == before.specs[weight].format:
                assert weight not in told.tensors
                assert after.read(weight).codes.tobytes() == before.read(weight).codes.tobytes()
                continue
            made = after.read(weight)
            codes, scales, cost = expected(before.read(weight), made, rule)
            assert made.codes.tobytes() == codes.tobytes()
            assert made.scales is not None and made.scales.tobytes() == scales.tobytes()
            assert told.tensors[weight] == cost
            seen += 1
    assert seen == len(told.tensors) > 5
    judged = verify(tmp_path / "out", level="values").findings
    errors = {found.check for found in judged if found.severity == "error"}
    assert errors <= {"expert ids"}  # the source's random ones


def test_dense_fp8_is_what_the_published_checkpoints_hold(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Norms, gate, compressor, weights_proj, embed and head stay; wo_a too is FP8 in hf."""
    convert(sources["bf16"], tmp_path / "out", Request("hf", 1, "fp8", "fp8", lossy=True))
    with Checkpoint.open(sources["fp8"]) as published, Checkpoint.open(tmp_path / "out") as made:
        assert {n: s.format for n, s in made.specs.items()} == {
            n: s.format for n, s in published.specs.items()
        }
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["expert_dtype"] == "fp8"
    assert kept["quantization_config"]["weight_block_size"] == [128, 128]
    assert "modules_to_not_convert" not in kept["quantization_config"]


def test_fp4_tiles_beyond_the_bound_are_rounded_and_no_others(tmp_path: Path) -> None:
    def spread(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        if tensor.spec.kind != "expert" or not tensor.is_scale:
            return None
        scales = rng.integers(118, 122, tensor.shape, dtype=np.uint8)
        scales[3, 0] = 90  # too far from its neighbours for the first tile
        return scales

    raw = config(**{**ONE, "hidden_size": 256})
    source = write_checkpoint(tmp_path / "src", raw, values=spread)
    request = Request("mp", 1, "fp8")
    with pytest.raises(ValueNotExactError, match="--lossy rounds"):
        convert(source, tmp_path / "no", request)
    report = convert(source, tmp_path / "out", Request("mp", 1, "fp8", lossy=True))
    assert report.manifest.requantised is not None
    with Checkpoint.open(source) as before, Checkpoint.open(tmp_path / "out") as after:
        experts = [name for name, spec in before.specs.items() if spec.kind == "expert"]
        for name in experts:
            old, new = before.read(name), after.read(name)
            assert old.scales is not None and new.scales is not None
            want, got = old.decode(), new.decode()
            rounded = np.zeros_like(want, bool)
            rounded[:128, :128] = True
            assert np.array_equal(want[~rounded], got[~rounded])
            assert not np.array_equal(want[rounded], got[rounded])
            # the published rule: the largest scale of a tile over 2**6
            tiles = old.scales.reshape(old.scales.shape[0] // 128, 128, -1, 4).max(axis=(1, 3)) - 6
            mine = new.scales.copy()
            mine[0, 0] = tiles[0, 0]
            assert np.array_equal(mine, tiles)
            cost = report.manifest.requantised.tensors[name]
            error = (want.astype(float) - got.astype(float)) ** 2
            assert cost.error_squares == pytest.approx(error.sum(), rel=1e-12)
            assert cost.blocks - cost.exact_blocks == 1
            assert sum(cost.exponents.values()) == cost.blocks == tiles.size
            assert set(cost.exponents) == set((new.scales.astype(int) - e8m0.BIAS).flat)


class TestIdempotence:
    @pytest.mark.parametrize("way", ["fp8", "bf16"])
    def test_fp4_comes_back(self, way: Any, sources: dict[str, Path], tmp_path: Path) -> None:
        fp4 = convert(sources["fp8"], tmp_path / "fp4", Request("hf", 1, "fp4", lossy=True))
        away = convert(tmp_path / "fp4", tmp_path / "away", Request("mp", 2, way, lossy=True))
        back = convert(tmp_path / "away", tmp_path / "back", Request("hf", 1, "fp4", lossy=True))
        digests = {r.manifest.value_digest for r in (fp4, away, back)}
        assert len(digests) == 1
        for report in (away, back):
            told = report.manifest.requantised
            assert told is None or (told.model.error_squares == 0 and told.model.exact_share == 1)

    def test_what_is_exact_gives_the_same_files(
        self, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        convert(sources["fp8"], tmp_path / "fp4", Request("hf", 1, "fp4", lossy=True))
        for way in (Request("mp", 2, "fp8"), Request("hf", 1, "bf16", "bf16")):
            lossy = Request(way.layout, way.gpus, way.experts, way.dense, lossy=True)
            convert(tmp_path / "fp4", tmp_path / f"a{way.layout}", way)
            convert(tmp_path / "fp4", tmp_path / f"b{way.layout}", lossy)
            files = [tree(tmp_path / f"{which}{way.layout}") for which in "ab"]
            assert {k: v for k, v in files[0].items() if k not in (MANIFEST, "SHA256SUMS")} == {
                k: v for k, v in files[1].items() if k not in (MANIFEST, "SHA256SUMS")
            }


class TestTheManifest:
    def test_layers_and_model_add_up_and_survive_the_file(
        self, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        report = convert(sources["bf16"], tmp_path / "out", Request("hf", 1, "fp4", lossy=True))
        told = report.manifest.requantised
        held = read_manifest(tmp_path / "out" / MANIFEST).requantised
        assert told is not None and held is not None
        assert held.model == told.model and held.layers == told.layers
        assert set(held.layers) == {"0"} and sum(held.model.exponents.values()) == held.model.blocks
        raw = json.loads((tmp_path / "out" / MANIFEST).read_text())
        assert raw["requantised"]["model"]["sqnr_db"] == round(told.model.sqnr, 4)
        name = "layers.0.ffn.experts.1.w2.weight"
        assert raw["requantised"]["tensors"][name]["saturated"] == told.tensors[name].saturated
        assert raw["tensors"][name]["source"] != raw["tensors"][name]["digest"]
        assert "source" not in raw["tensors"]["embed.weight"]

    def test_a_second_run_finds_it_done(self, sources: dict[str, Path], tmp_path: Path) -> None:
        request = Request("hf", 1, "fp4", lossy=True)
        convert(sources["fp8"], tmp_path / "out", request)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        again = convert(sources["fp8"], tmp_path / "out", request)
        assert again.resumed_bytes == again.bytes
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    @pytest.mark.parametrize("workers", [1, 3])
    def test_neither_threads_nor_memory_change_a_figure(
        self,
        workers: int,
        sources: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from dsv4_quant.conversion import budget

        def run(name: str, **limits: Any) -> dict[str, str]:
            convert(sources["bf16"], tmp_path / name, Request("mp", 2, "fp4", lossy=True), **limits)
            return tree(tmp_path / name)

        usual = run("usual")
        monkeypatch.setattr(budget, "PANEL_VALUES", 1 << 12)
        monkeypatch.setattr(budget, "LEAST_VALUES", 1 << 12)
        assert run("small", workers=workers) == usual


def test_killed_it_continues_with_the_same_figures(
    sources: dict[str, Path],
    tmp_path: Path,
    driver: Callable[[dict[str, Any]], Outcome],
) -> None:
    job = {"src": str(sources["fp8"]), "request": ["mp", 2, "fp4", "keep", True], "cut": 1 << 14}
    assert driver({**job, "out": str(tmp_path / "whole")}).get("error") is None
    out = tmp_path / "out"
    fault = {"call": "write", "nth": 5, "action": "kill"}
    assert driver({**job, "out": str(out), "fault": fault}) == {"signal": 9}
    assert driver({**job, "out": str(out)})["resumed"] > 0
    assert tree(out) == tree(tmp_path / "whole")


def with_one_value(root: Path, name: str, at: tuple[int, int], bits: int) -> Path:
    """A BF16 checkpoint that is ordinary but for one value."""

    def values(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        made = ordinary(tensor, rng)
        if made is not None and tensor.name == name:
            made[at] = bits
        return made

    raw = config(**ONE, quantization_config=None, expert_dtype=None)
    return write_checkpoint(root, raw, SOURCES["bf16"], values=values)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_infinities_and_nan_are_refused_with_their_place(bits: int, tmp_path: Path) -> None:
    source = with_one_value(tmp_path / "src", "layers.0.ffn.experts.1.w2.weight", (5, 77), bits)
    with pytest.raises(NotANumberError) as caught:
        convert(source, tmp_path / "out", Request("hf", 1, "fp4", lossy=True))
    assert caught.value.tensor == "layers.0.ffn.experts.1.w2.weight"
    assert not (tmp_path / "out").exists()


def test_least_squares_is_never_worse_in_any_weight(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    costs: dict[ScaleRule, ConvertReport] = {}
    for rule in ScaleRule:
        request = Request("hf", 1, "fp4", "fp8", lossy=True, rule=rule)
        costs[rule] = convert(sources["bf16"], tmp_path / rule.value, request)
    best = costs[ScaleRule.LEAST_SQUARES].manifest.requantised
    plain = costs[ScaleRule.MAX].manifest.requantised
    assert best is not None and plain is not None
    for name, cost in best.tensors.items():
        assert cost.error_squares <= plain.tensors[name].error_squares
    assert best.model.sqnr > plain.model.sqnr
    assert plain.model.saturated == 0 < best.model.saturated


@pytest.mark.parametrize(("experts", "bits"), [("fp4", 0x7F7F), ("fp8", 0x7F7F), ("fp4", 0x7F61)])
def test_nothing_is_rounded_to_infinity(experts: Any, bits: int, tmp_path: Path) -> None:
    """The nearest code times its scale may be 2**128, which no float32 reader can hold."""
    source = with_one_value(tmp_path / "src", "layers.0.ffn.experts.0.w3.weight", (9, 40), bits)
    with pytest.raises(NotANumberError, match="row 9, column 40 rounds to 2\\*\\*128") as caught:
        convert(source, tmp_path / "out", Request("hf", 1, experts, lossy=True))
    assert caught.value.tensor == "layers.0.ffn.experts.0.w3.weight"
    assert not (tmp_path / "out").exists()
