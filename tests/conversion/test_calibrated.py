"""``--calibrate`` on its way through a conversion: other codes, the same scales, true figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsv4_quant.checkpoint.manifest import read_manifest
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion import budget
from dsv4_quant.conversion.calibrated import _measured
from dsv4_quant.conversion.operations import Panel
from dsv4_quant.conversion.requantise import requantise
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.blocks import BF16, FP4, Format, Tensor, fp8
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.figures import Figures, cost
from dsv4_quant.kernels.second_order_factor_numba import Factor, factor
from tests.conversion.checkpoints import tree
from tests.conversion.test_lossy import sources  # noqa: F401

REQUEST = Request("mp", 2, "fp4", lossy=True)


class Inputs:
    """Strongly correlated ones for every expert but one, which no prompt reached."""

    def reserve(self, most: int, threads: int) -> int:
        return 1 << 20

    def held_out(self, name: str) -> NDArray[np.float32]:
        return self.inputs(name)[64:]

    def inputs(self, name: str) -> NDArray[np.float32]:
        rng = np.random.default_rng(len(name))
        few = rng.standard_normal((96, 8)) @ rng.standard_normal((8, 128))
        return (few + 0.05 * rng.standard_normal((96, 128))).astype(np.float32)

    def factor(self, name: str) -> Factor | None:
        if ".experts." not in name or ".experts.1.w2" in name:
            return None
        return factor(self.inputs(name)[:64])

    def describe(self) -> dict[str, Any]:
        return {"identity": "a test's", "tokens": 64}


@pytest.mark.parametrize("after", [FP4, fp8((128, 128)), fp8((32, 64))])
def test_the_figures_of_plain_codes_are_those_of_plain_rounding(after: Format) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 192)).astype(np.float32) * np.float32(2.0**-100)
    values[:, :40] = 0
    values[3, 50:60] *= 2000
    bits = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    panel = Panel("w", 0, Tensor(BF16, (200, 192), bits), after)
    for rule in ScaleRule:
        plain = requantise(panel, rule)
        assert plain.tensor.scales is not None
        again = _measured(panel.tensor.decode(), plain.tensor, plain.figures)
        for held, want in zip(again_of(again), again_of(plain.figures), strict=True):
            assert held.tobytes() == want.tobytes()


def again_of(figures: Figures) -> list[Any]:
    return [
        figures.value_squares,
        figures.error_squares,
        figures.largest_error,
        figures.counts,
        figures.scales,
    ]


def test_codes_move_scales_stay_and_the_cost_is_what_it_is(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    convert(sources["bf16"], tmp_path / "plain", REQUEST)
    report = convert(sources["bf16"], tmp_path / "out", REQUEST, factors=Inputs())
    told = report.manifest.requantised
    assert told is not None and told.calibration is not None
    assert told.calibration.items() >= Inputs().describe().items()
    assert told.calibration["weights_moved"] == 5 and told.calibration["rows_moved"] > 300
    assert read_manifest(tmp_path / "out" / "dsv4-manifest.json").requantised is not None
    moved = 0
    with (
        Checkpoint.open(sources["bf16"]) as before,
        Checkpoint.open(tmp_path / "plain") as plain,
        Checkpoint.open(tmp_path / "out") as after,
    ):
        for name, spec in after.specs.items():
            ours, theirs = after.read(name), plain.read(name)
            assert ours.scales is None or ours.scales.tobytes() == theirs.scales.tobytes()  # type: ignore[union-attr]
            differs = ours.codes.tobytes() != theirs.codes.tobytes()
            moved += differs
            assert differs == (spec.kind == "expert" and ".experts.1.w2" not in name), name
            if spec.kind == "expert":
                errors = before.read(name).decode().astype(float) - ours.decode()
                assert told.tensors[name].error_squares == pytest.approx((errors**2).sum())
                assert told.tensors[name].largest_error == np.abs(errors).max().astype(np.float32)
    assert moved == 5
    assert cost([]).values == 0


def test_neither_threads_nor_panels_change_a_bit(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert(sources["bf16"], tmp_path / "a", REQUEST, factors=Inputs())
    monkeypatch.setattr(budget, "PANEL_VALUES", 1 << 12)
    monkeypatch.setattr(budget, "LEAST_VALUES", 1 << 12)
    convert(sources["bf16"], tmp_path / "b", REQUEST, factors=Inputs(), workers=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_what_is_on_the_grid_stays(sources: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    fp4 = convert(sources["bf16"], tmp_path / "fp4", Request("hf", 1, "fp4", lossy=True))
    bf16 = convert(tmp_path / "fp4", tmp_path / "bf16", Request("hf", 1, "bf16"))
    back = convert(
        tmp_path / "bf16", tmp_path / "back", Request("hf", 1, "fp4", lossy=True), factors=Inputs()
    )
    digests = {report.manifest.value_digest for report in (fp4, bf16, back)}
    assert len(digests) == 1


def test_another_calibration_is_another_conversion(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    convert(sources["bf16"], tmp_path / "out", REQUEST, factors=Inputs())
    again = convert(sources["bf16"], tmp_path / "out", REQUEST, factors=Inputs())
    assert again.resumed_bytes == again.bytes
    with pytest.raises(UsageError, match="not empty"):
        convert(sources["bf16"], tmp_path / "out", REQUEST)


class Misled(Inputs):
    """What is held out is nothing like what the factor has seen."""

    def held_out(self, name: str) -> NDArray[np.float32]:
        return np.random.default_rng(1).standard_normal((200, 128)).astype(np.float32)


def test_codes_move_only_where_held_out_inputs_say_so(
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    convert(sources["bf16"], tmp_path / "plain", REQUEST)
    report = convert(sources["bf16"], tmp_path / "out", REQUEST, factors=Misled())
    told = report.manifest.requantised
    assert told is not None and told.calibration is not None
    assert told.calibration["weights_moved"] == told.calibration["rows_moved"] == 0
    plain, out = tree(tmp_path / "plain"), tree(tmp_path / "out")
    assert all(plain[name] == out[name] for name in plain if name.endswith(".safetensors"))
