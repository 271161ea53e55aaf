"""What ``convert --lossy`` has rounded is known as such; and damage, or a lie, among it is told."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS, Manifest, read_manifest
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.checkpoint.requantised import by_layer
from dsv4_quant.cli.main import app
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.fingerprints.document import Fingerprint
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.make import make_fingerprint
from dsv4_quant.formats.cost import Cost
from dsv4_quant.validators.report import Report, Rounded
from dsv4_quant.validators.rounding import Measured
from dsv4_quant.validators.verify import verify
from tests.folders import copy_of, edited_json, golden
from tests.validators.damages import NORM, W1, set_bytes

SOURCE = golden("tiny-base")
EXACT = "layers.1.attn.wo_a.weight"
"""BF16 in the layout mp, from FP8: requantised without an error."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden -Base checkpoint with its experts in FP4, by layout."""
    root = tmp_path_factory.mktemp("rounded")
    for layout, gpus in (("hf", 1), ("mp", 2)):
        convert(SOURCE, root / layout, Request(layout, gpus, "fp4", lossy=True), workers=2)
    return {layout: root / layout for layout in ("hf", "mp")}


@pytest.fixture
def out(made: dict[str, Path], tmp_path: Path) -> Path:
    """One of them, to be damaged."""
    return Path(shutil.copytree(made["hf"], tmp_path / "out"))


@pytest.fixture(scope="module")
def out_once(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose manifest is written anew by every example."""
    return Path(shutil.copytree(made["hf"], tmp_path_factory.mktemp("junk") / "out"))


def said(report: Report) -> set[tuple[str, str | None, str | None]]:
    return {(one.check, one.file, one.tensor) for one in report.findings}


def sign(root: Path) -> None:
    """A new SHA256SUMS line for the manifest: whoever changed it knows what they are doing."""
    lines = (root / SUMS).read_text().splitlines()
    kept = [line for line in lines if not line.endswith(f"  {MANIFEST}")]
    digest = hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    (root / SUMS).write_text("\n".join([*kept, f"{digest}  {MANIFEST}"]) + "\n")


def rewrite(root: Path, change: Callable[[Manifest], Manifest]) -> None:
    path = root / MANIFEST
    path.write_bytes(change(read_manifest(path)).to_json())
    sign(root)


@pytest.mark.parametrize("layout", ["hf", "mp"])
def test_a_sound_output_holds(layout: str, made: dict[str, Path]) -> None:
    report = verify(made[layout], against=SOURCE, workers=2)
    assert report.findings == ()
    manifest = read_manifest(made[layout] / MANIFEST)
    assert manifest.requantised is not None
    sqnr = manifest.requantised.model.sqnr
    assert report.rounded == Rounded(144, 144, sqnr) and math.isfinite(sqnr)
    exact = {n for n, cost in manifest.requantised.tensors.items() if cost.error_squares == 0}
    assert exact == {n for n in manifest.tensors if layout == "mp" and n.endswith("wo_a.weight")}
    alone = verify(made[layout], workers=2)
    assert alone.findings == () and alone.rounded is None


def test_equal_values_are_equal_whatever_they_were_made_of(made: dict[str, Path]) -> None:
    for one, other in (("hf", "mp"), ("mp", "hf")):
        report = verify(made[one], against=made[other], workers=2)
        assert report.findings == ()
        assert report.rounded is not None and report.rounded.as_declared == 0


def test_without_its_manifest_nobody_knows_that_it_was_rounded(out: Path) -> None:
    (out / MANIFEST).unlink()
    (out / SUMS).unlink()
    report = verify(out, against=SOURCE, workers=2)
    assert report.errors == 144 and report.rounded is None


def test_the_command_says_it(made: dict[str, Path], tmp_path: Path) -> None:
    told = tmp_path / "report.json"
    done = CliRunner().invoke(
        app, ["verify", str(made["hf"]), "--against", str(SOURCE), "--json", str(told)]
    )
    assert done.exit_code == 0, done.output
    rounded = json.loads(told.read_text())["rounded"]
    assert (rounded["as_declared"], rounded["declared"]) == (144, 144)
    raw = json.loads((made["hf"] / MANIFEST).read_text())["requantised"]["model"]
    assert rounded["sqnr_db"] == raw["sqnr_db"]
    assert f"rounded as declared: 144 weights, SQNR {raw['sqnr_db']:.2f} dB" in done.stdout


class TestDamage:
    def test_a_code_of_a_rounded_weight(self, out: Path) -> None:
        set_bytes(W1, 300, -1)(out)
        report = verify(out, against=SOURCE, workers=2)
        assert {one.tensor for one in report.findings} == {None, W1}
        assert {one.check for one in report.findings} == {"bytes", "digests"}
        assert report.errors == 2
        assert report.rounded is not None and report.rounded.as_declared == 143

    def test_a_value_of_another_weight(self, out: Path) -> None:
        set_bytes(NORM, 20, -1)(out)
        report = verify(out, against=SOURCE, workers=2)
        found = {(check, tensor) for check, _, tensor in said(report)}
        assert found == {("bytes", None), ("digests", NORM), ("against", NORM)}
        assert report.rounded is not None and report.rounded.as_declared == 144

    def test_a_value_of_a_weight_that_was_requantised_exactly(
        self, made: dict[str, Path], tmp_path: Path
    ) -> None:
        root = Path(shutil.copytree(made["mp"], tmp_path / "mp"))
        set_bytes(EXACT, 20, -1, file="model0-mp2.safetensors")(root)
        report = verify(root, against=SOURCE, workers=2)
        found = {(check, tensor) for check, _, tensor in said(report)}
        assert found == {("bytes", None), ("digests", EXACT), ("against", EXACT)}

    @pytest.mark.parametrize("code", [-1, 0x7F])
    def test_a_source_that_was_changed_after(
        self, code: int, made: dict[str, Path], tmp_path: Path
    ) -> None:
        source = copy_of("tiny-base", tmp_path / "source")
        set_bytes(W1, 300, code)(source)  # another value, or NaN
        report = verify(made["hf"], against=source, workers=2)
        assert [(one.check, one.tensor) for one in report.findings] == [("against", W1)]
        assert "rounded from other values" in report.findings[0].meaning
        assert report.rounded is not None and report.rounded.as_declared == 143


@pytest.mark.parametrize(
    "change",
    [
        lambda cost: replace(cost, value_squares=cost.value_squares * (1 + 1e-8)),
        lambda cost: replace(cost, error_squares=cost.error_squares * (1 - 1e-8)),
        lambda cost: replace(
            cost, largest_error=float(np.nextafter(np.float32(cost.largest_error), np.float32(0)))
        ),
        lambda cost: replace(cost, flushed=cost.flushed + 1),
    ],
    ids=["value_squares", "error_squares", "largest_error", "flushed"],
)
def test_another_error_than_the_stated_one(
    change: Callable[[Cost], Cost], out: Path, request: pytest.FixtureRequest
) -> None:
    """The lie is told in weight and layer alike: only who measures can know."""

    def lie(manifest: Manifest) -> Manifest:
        section = manifest.requantised
        assert section is not None
        costs = {**section.tensors, W1: change(section.tensors[W1])}
        with Checkpoint.open(out) as held:
            layers = by_layer(held.specs.values(), costs)
        layers = {n: replace(c, exponents=section.layers[n].exponents) for n, c in layers.items()}
        return replace(manifest, requantised=replace(section, tensors=costs, layers=layers))

    rewrite(out, lie)
    assert verify(out, workers=2).findings == ()
    report = verify(out, against=SOURCE, workers=2)
    assert said(report) == {("against", MANIFEST, W1)}
    (found,) = report.findings
    assert "states another error than is measured" in found.meaning
    assert found.found.startswith(request.node.callspec.id) and "," not in found.found
    assert report.rounded is not None and report.rounded.as_declared == 143


def set_in(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of the manifest; a function of the old one, or ``None`` to remove."""

    def do(raw: dict[str, Any]) -> None:
        *way, last = path
        for key in way:
            raw = raw[key]
        if to is None:
            del raw[last]
        else:
            raw[last] = to(raw[last]) if callable(to) else to

    return do


def requantised(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    return set_in("requantised", *path, to=to)


@pytest.mark.parametrize(
    ("change", "tensor", "told"),
    [
        (requantised("rule", to="sharp"), None, "requantised.rule 'sharp'"),
        (requantised("layers", "1", "error_squares", to=lambda v: v * (1 + 1e-11)), None,
         "layer 1 error_squares"),
        (requantised("layers", "1", "flushed", to=lambda n: n + 1), None, "layer 1 flushed"),
        (requantised("layers", "1", "largest_error", to=9.0), None, "layer 1 largest_error 9"),
        (requantised("layers", "1", "exponents", to={}), None, "layer 1 exponents"),
        (requantised("layers", "1", to=None), None, "of layer 1 nothing"),
        (lambda raw: raw["requantised"]["layers"].update({"7": raw["requantised"]["layers"]["1"]}),
         None, "of layer 7 its cost"),
        (lambda raw: raw["requantised"]["tensors"].update(x=raw["requantised"]["tensors"][W1]),
         "x", "a cost"),
        (requantised("tensors", W1, "values", to=7), W1, "values 7"),
        (requantised("tensors", W1, "blocks", to=7), W1, "blocks 7"),
        (requantised("tensors", W1, "saturated", to=-1), W1, "saturated -1"),
        (requantised("tensors", W1, "error_squares", to=-1.0), W1, "error_squares -1"),
        (requantised("tensors", W1, "value_squares", to=1e300), W1, "value_squares 1e+300"),
        (requantised("tensors", W1, "largest_error", to=1e30), W1, "largest_error 1e+30"),
        (requantised("tensors", W1, "exact_blocks", to=1024), W1, "exact_blocks 1,024"),
        (set_in("tensors", W1, "source", to=None), W1, "error_squares"),
        (lambda raw: raw["tensors"][NORM].update(source="0" * 64), NORM, "in requantised nothing"),
        (lambda raw: raw["tensors"][W1].update(source=raw["tensors"][W1]["digest"]), W1,
         "source"),
    ],
)  # fmt: skip
def test_a_section_that_contradicts_itself(
    change: Callable[[dict[str, Any]], None], tensor: str | None, told: str, out: Path
) -> None:
    with edited_json(out / MANIFEST) as raw:
        change(raw)
    sign(out)
    report = verify(out, "checksums", workers=2)
    assert said(report) == {("manifest", MANIFEST, tensor)}
    assert any(told in one.found for one in report.findings), report.findings


def test_a_weight_that_the_section_leaves_out(out: Path) -> None:
    with edited_json(out / MANIFEST) as raw:
        del raw["requantised"]["tensors"][W1]
    sign(out)
    found = verify(out, "checksums", workers=2).findings
    assert {one.found.split()[0] for one in found if one.tensor is None} == {"layer"}
    assert [(one.tensor, one.found) for one in found if one.tensor] == [
        (W1, "a source, and in requantised nothing")
    ]


@pytest.mark.parametrize("key", [key for key in Cost().to_json() if key != "exponents"])
@pytest.mark.parametrize("junk", [10**400, 1e999, -1e308, 1e308, 1.5, None])
def test_a_figure_that_is_junk(key: str, junk: Any, made: dict[str, Path], out_once: Path) -> None:
    """Whatever stands there, the judge ends in a report."""
    before = (made["hf"] / MANIFEST).read_text()
    for place in ("tensors", "layers"):
        raw = json.loads(before)
        raw["requantised"][place]["1" if place == "layers" else W1][key] = junk
        (out_once / MANIFEST).write_text(json.dumps(raw).replace("Infinity", "1e999"))
        sign(out_once)
        report = verify(out_once, "checksums", workers=1)
        assert {one.check for one in report.findings} == {"manifest"}
        json.dumps(report.to_json())


def test_a_count_beyond_all_numbers(out: Path) -> None:
    with edited_json(out / MANIFEST) as raw:
        raw["requantised"]["tensors"][W1] |= {"flushed": 10**400, "value_squares": 1e308}
    sign(out)
    report = verify(out, against=SOURCE, workers=2)
    assert said(report) == {("manifest", MANIFEST, W1), ("against", MANIFEST, W1)}
    assert all(len(one.what) < 300 for one in report.findings)


def test_a_section_that_is_missing(out: Path) -> None:
    with edited_json(out / MANIFEST) as raw:
        del raw["requantised"]
    sign(out)
    report = verify(out, against=SOURCE, workers=2)
    assert report.errors == 144
    assert {one.check for one in report.findings} == {"manifest"} and report.rounded is None


def test_parts_in_any_order_measure_the_same() -> None:
    rng = np.random.default_rng(5)
    before = rng.standard_normal((64, 96)).astype(np.float32)
    after = np.round(before * 2) / np.float32(2)
    whole, parts = Measured(), [Measured() for _ in range(4)]
    whole.add(before, after)
    for number in (2, 0, 3, 1):
        rows = slice(16 * number, 16 * number + 16)
        parts[number].add(before[rows], after[rows])
    forth, back = Measured(), Measured()
    for part in parts:
        forth.join(part)
    for part in reversed(parts):
        back.join(part)
    errors = before.astype(np.float64) - after
    for found in (whole, forth, back):
        assert math.fsum(found.error_squares) == pytest.approx(np.square(errors).sum(), rel=1e-14)
        assert found.largest_error == np.abs(errors).max()
        assert found.flushed == np.count_nonzero((before != 0) & (after == 0)) > 0
    assert math.fsum(forth.value_squares) == math.fsum(back.value_squares)


@pytest.fixture(scope="module")
def recorded() -> Fingerprint:
    return make_fingerprint(SOURCE, [list(range(20))], digest=True, threads=1)


class TestTheGate:
    def judged(self, root: Path, recorded: Fingerprint, folder: Path, **how: Any) -> Report:
        (folder / "F.json").write_bytes(to_json(recorded))
        return verify(root, "forward", fingerprint=folder / "F.json", workers=2, **how)

    def test_lossy_for_what_was_rounded(
        self, recorded: Fingerprint, made: dict[str, Path], tmp_path: Path
    ) -> None:
        forward = self.judged(made["mp"], recorded, tmp_path).forward
        assert str(forward).startswith(
            "gate lossy (by the manifest 144 weights were rounded, from those of the fingerprint)"
        )

    def test_lossy_where_the_fingerprint_does_not_say_its_values(
        self, recorded: Fingerprint, made: dict[str, Path], tmp_path: Path
    ) -> None:
        assert recorded.measured is not None
        silent = replace(recorded, measured=replace(recorded.measured, value_digest=None))
        forward = self.judged(made["hf"], silent, tmp_path).forward
        assert str(forward).startswith("gate lossy (by the manifest 144 weights were rounded, and")

    def test_the_strictest_for_the_rounded_weights_themselves(
        self, made: dict[str, Path], tmp_path: Path
    ) -> None:
        own = make_fingerprint(made["hf"], [list(range(20))], threads=1)
        report = self.judged(made["mp"], own, tmp_path)
        assert report.findings == () and str(report.forward).startswith("gate bit")

    def test_the_one_that_is_asked_for(
        self, recorded: Fingerprint, made: dict[str, Path], tmp_path: Path
    ) -> None:
        report = self.judged(made["hf"], recorded, tmp_path, gate="bit")
        assert str(report.forward).startswith("gate bit (it was asked for)") and not report.holds

    def test_the_strictest_for_another_model_s(
        self, recorded: Fingerprint, made: dict[str, Path], tmp_path: Path
    ) -> None:
        assert recorded.measured is not None
        other = replace(recorded, measured=replace(recorded.measured, value_digest="0" * 64))
        report = self.judged(made["hf"], other, tmp_path)
        assert str(report.forward).startswith("gate bit (recorded") and not report.holds
