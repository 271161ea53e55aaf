"""``--move``: the source goes as the output comes, and no weight is ever in neither."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsv4_quant.catalogue import StoredTensor
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.conversion import moving
from dsv4_quant.conversion import plan as plans
from dsv4_quant.conversion.budget import Budget
from dsv4_quant.conversion.journal import FOLDER, FREED
from dsv4_quant.conversion.moving import last_uses, peak_bytes
from dsv4_quant.conversion.plan import make_plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import (
    DiskSpaceError,
    NotANumberError,
    SourceDamagedError,
    UnreadableError,
    UsageError,
    ValueNotExactError,
    WriteError,
)
from dsv4_quant.progress import NoProgress
from tests.conversion.checkpoints import (
    config,
    formats,
    tree,
    write_checkpoint,
    write_hollow,
)
from tests.conversion.conftest import Disk, Outcome
from tests.folders import INDEX

REQUEST = Request("mp", 2, "fp8")
CUT = 1 << 18
WIDE = {"hidden_size": 1024, "vocab_size": 8192}


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards with a manifest: what a conversion to hf makes."""
    folder = tmp_path_factory.mktemp("pinned")
    raw = config(n_routed_experts=16, num_nextn_predict_layers=0)
    write_checkpoint(folder / "raw", raw, seed=1)
    convert(folder / "raw", folder / "src", Request("hf"))
    return folder / "src"


@pytest.fixture(scope="module")
def reference(pinned: Path) -> dict[str, str]:
    out = pinned.parent / "reference"
    convert(pinned, out, REQUEST)
    return tree(out)


@pytest.fixture
def source(pinned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pinned, tmp_path / "src"))


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.cuts, "__defaults__", (CUT,))


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def kept(out: Path) -> dict[str, str]:
    """All of an unfinished output but the headers beside it."""
    return {name: held for name, held in tree(out).items() if f"/{FREED}/" not in name}


def test_the_output_is_the_same_and_the_source_is_gone(
    source: Path, reference: dict[str, str], tmp_path: Path, small_cuts: None
) -> None:
    convert(source, tmp_path / "out", REQUEST, move=True)
    assert tree(tmp_path / "out") == reference
    assert not shards(source) and (source / "config.json").exists()
    assert not (tmp_path / "out" / FOLDER).exists()
    with pytest.raises(UnreadableError, match="names a shard that is not there"):
        Checkpoint.open(source)


def run(driver: Callable[[dict[str, Any]], Outcome], src: Path, out: Path, **job: Any) -> Outcome:
    usual = {"request": ["mp", 2, "fp8", "keep"], "cut": CUT, "move": True}
    return driver({**usual, "src": str(src), "out": str(out), **job})


@pytest.fixture(scope="module")
def calls(
    pinned: Path, driver: Callable[[dict[str, Any]], Outcome], reference: dict[str, str]
) -> list[str]:
    source = pinned.parent / "whole"
    shutil.copytree(pinned, source)
    found: list[str] = run(driver, source, pinned.parent / "moved", here=True)["calls"]
    assert tree(pinned.parent / "moved") == reference
    return found


@pytest.mark.parametrize("action", ["kill", "power"])
def test_killed_at_any_call_nothing_is_lost(
    action: str,
    calls: list[str],
    pinned: Path,
    reference: dict[str, str],
    driver: Callable[[dict[str, Any]], Outcome],
    tmp_path: Path,
) -> None:
    numbers = [n for n, call in enumerate(calls) if call == "unlink"]
    chosen = sorted({*numbers, *(n + 1 for n in numbers), *(n - 1 for n in numbers)})
    others = [n for n, call in enumerate(calls) if n not in chosen and call != "pwritev"]
    freed_early = 0
    phase = 0 if action == "kill" else 1
    for number in [*chosen[phase::2], *others[phase::29]]:
        if number >= len(calls):
            continue
        source, out = tmp_path / f"src{number}", tmp_path / f"out{number}"
        shutil.copytree(pinned, source)
        fault = {"call": calls[number], "nth": calls[:number].count(calls[number])}
        outcome = run(driver, source, out, fault={**fault, "action": action})
        assert outcome == {"signal": 9}
        kept = out / FOLDER / FREED
        gone = shards(pinned) - shards(source)
        whole = (out / MANIFEST).exists() and not (out / FOLDER / "journal").exists()
        assert whole or gone <= (shards(kept) if kept.is_dir() else set())
        freed_early += 0 < len(gone) < len(shards(pinned))
        outcome = run(driver, source, out)
        assert "bytes" in outcome or (whole and outcome["error"] == "IndexFileError"), outcome
        assert tree(out) == reference and not (out / FOLDER).exists()
        shutil.rmtree(source)
        shutil.rmtree(out)
    assert freed_early > 5


class TestRefused:
    def test_without_a_manifest(self, source: Path, tmp_path: Path) -> None:
        (source / MANIFEST).unlink()
        with pytest.raises(UsageError, match="--move needs a manifest in SRC"):
            convert(source, tmp_path / "out", REQUEST, move=True)
        assert len(shards(source)) == 4 and not (tmp_path / "out").exists()

    def test_a_source_that_its_manifest_contradicts(
        self, source: Path, tmp_path: Path, small_cuts: None
    ) -> None:
        last = sorted(shards(source))[-1]
        path = source / last
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        before = tree(source)
        with pytest.raises(SourceDamagedError):
            convert(source, tmp_path / "out", REQUEST, move=True)
        assert tree(source) == before and not (tmp_path / "out").exists()

    def test_a_cast_that_would_change_a_value(self, tmp_path: Path, small_cuts: None) -> None:
        """It is found before anything is freed, though it stands in the last shard but one."""

        def ones(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
            if ".experts." not in tensor.name:
                return None
            made = np.full(tensor.shape, 127 if tensor.is_scale else 0x38, np.uint8)
            if tensor.name == "layers.1.ffn.experts.15.w3.weight":
                made[3, 4] = 0x39  # 1.125, which no FP4 block holds beside 1
            return made

        raw = config(n_routed_experts=16, num_nextn_predict_layers=0, expert_dtype="fp8")
        write_checkpoint(tmp_path / "raw", raw, formats(experts="fp8"), values=ones)
        convert(tmp_path / "raw", tmp_path / "src", Request("hf"))
        before = tree(tmp_path / "src")
        with pytest.raises(ValueNotExactError, match=r"experts\.15\.w3"):
            convert(tmp_path / "src", tmp_path / "out", Request("hf", 1, "fp4"), move=True)
        assert tree(tmp_path / "src") == before and not (tmp_path / "out").exists()

    def test_links(self, source: Path, tmp_path: Path) -> None:
        first = sorted(shards(source))[0]
        (source / "held").mkdir()
        (source / first).rename(source / "held" / first)
        (source / first).symlink_to(Path("held") / first)
        with pytest.raises(UsageError, match="remove a link"):
            convert(source, tmp_path / "out", REQUEST, move=True)


class TestHalfWay:
    @pytest.fixture
    def unfinished(
        self, source: Path, tmp_path: Path, driver: Callable[[dict[str, Any]], Outcome]
    ) -> Path:
        """A run that was killed when two shards had been freed."""
        out = tmp_path / "out"
        fault = {"call": "unlink", "nth": 2, "action": "kill"}
        assert run(driver, source, out, fault=fault) == {"signal": 9}
        assert len(shards(out / FOLDER / FREED)) == 3 and len(shards(source)) == 2
        return out

    def test_nothing_discards_it(self, unfinished: Path, source: Path) -> None:
        before = kept(unfinished)
        for overwrite in (True, False):
            with pytest.raises(WriteError, match="it is their only copy"):
                convert(source, unfinished, Request("mp", 1), overwrite=overwrite)
        assert kept(unfinished) == before

    def test_another_source_with_files_of_the_same_names_touches_nothing(
        self,
        unfinished: Path,
        source: Path,
        pinned: Path,
        tmp_path: Path,
        reference: dict[str, str],
    ) -> None:
        raw = config(n_routed_experts=16, num_nextn_predict_layers=0)
        write_checkpoint(tmp_path / "raw", raw, seed=2)
        convert(tmp_path / "raw", tmp_path / "other", Request("hf"))
        before = tree(unfinished)
        assert shards(tmp_path / "other") == shards(source) | shards(unfinished / FOLDER / FREED)
        for overwrite in (False, True):
            with pytest.raises(WriteError, match="it is their only copy"):
                convert(tmp_path / "other", unfinished, REQUEST, overwrite=overwrite)
        assert tree(unfinished) == before
        convert(source, unfinished, REQUEST)
        assert tree(unfinished) == reference

    def test_what_is_at_its_place_already_is_not_overwritten(
        self,
        source: Path,
        tmp_path: Path,
        driver: Callable[[dict[str, Any]], Outcome],
        reference: dict[str, str],
    ) -> None:
        """Killed while the last source files go: the output's are at their place by then."""
        out = tmp_path / "out"
        fault = {"call": "unlink", "nth": 3, "action": "kill"}
        assert run(driver, source, out, fault=fault) == {"signal": 9}
        assert shards(out) and shards(out / FOLDER / FREED)
        before = kept(out)
        with pytest.raises(WriteError, match="it is their only copy"):
            convert(source, out, Request("mp", 1), overwrite=True)
        assert kept(out) == before
        convert(source, out, REQUEST)
        assert tree(out) == reference

    def test_it_continues_without_move_too(
        self, unfinished: Path, source: Path, reference: dict[str, str], small_cuts: None
    ) -> None:
        convert(source, unfinished, REQUEST)
        assert tree(unfinished) == reference and len(shards(source)) == 2

    def test_damage_to_what_is_the_only_copy_is_told(
        self,
        unfinished: Path,
        source: Path,
        pinned: Path,
        reference: dict[str, str],
        small_cuts: None,
    ) -> None:
        path = unfinished / FOLDER / "model0-mp2.safetensors"
        with path.open("r+b") as file:
            file.seek(len(path.read_bytes()[:100_000]))
            file.write(b"damage")
        with pytest.raises(WriteError, match="the source was freed") as caught:
            convert(source, unfinished, REQUEST, move=True)
        assert "fetch them again" in str(caught.value)
        for name in shards(pinned) - shards(source):
            shutil.copy(pinned / name, source / name)
        convert(source, unfinished, REQUEST)
        assert tree(unfinished) == reference


def test_a_disk_that_gives_back_other_bytes(
    source: Path, tmp_path: Path, small_cuts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the source is the only sound copy, and stays."""

    def wrong(path: Path, start: int, stop: int, sum: Any) -> None:
        sum.update(bytes(stop - start))

    before = tree(source)
    with monkeypatch.context() as patch:
        patch.setattr(moving, "rehash", wrong)
        with pytest.raises(WriteError, match="gives back other bytes"):
            convert(source, tmp_path / "out", Request("hf"), move=True)
    assert tree(source) == before
    convert(source, tmp_path / "out", Request("hf"), move=True)
    assert not shards(source)


def test_a_shard_is_in_use_until_the_last_step_that_reads_it(pinned: Path) -> None:
    index = json.loads((pinned / INDEX).read_text())["weight_map"]
    for request in (REQUEST, Request("hf")):
        expected: dict[str, int] = {}
        with Checkpoint.open(pinned) as source:
            plan = make_plan(source, request)
            for done, step in enumerate(plan.steps, 1):
                scale_alone = step.out.is_scale  # made of the scales alone, in both requests
                names = [held.name for held in source.stored(step.spec)][scale_alone:]
                expected |= {index[name]: done for name in names}
            assert last_uses(plan) == expected


def test_a_disk_that_cannot_hold_both(disk: Disk, tmp_path: Path, small_cuts: None) -> None:
    """The room is enough only if removed files are closed, too."""
    source, out = disk.place / "src", disk.place / "out"
    raw = config(
        n_routed_experts=64, num_hidden_layers=6, compress_ratios=[4, 128, 0, 4, 128, 0],
        num_nextn_predict_layers=0,
    )  # fmt: skip
    write_checkpoint(tmp_path / "raw", raw)
    convert(tmp_path / "raw", source, Request("hf"))
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, Request("hf"))
        headers = checkpoint.folder.headers
        sizes = {name: h.data_start + h.data_bytes for name, h in headers.items()}
        peak = peak_bytes(plans.cuts(plan), last_uses(plan), sizes)
    held = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    slack = 3 << 20
    assert peak + slack < 0.6 * plan.bytes
    disk.resize(held + peak + slack)
    with pytest.raises(DiskSpaceError):
        convert(source, out, Request("hf"))
    convert(source, out, Request("hf"), move=True)
    assert not shards(source) and len(shards(out)) == 8


def test_a_complete_output_is_no_move(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", REQUEST)
    with pytest.raises(UsageError, match="complete already"):
        convert(source, tmp_path / "out", REQUEST, move=True)
    assert len(shards(source)) == 4


def test_rounding_is_rehearsed_too(tmp_path: Path, small_cuts: None) -> None:
    """An infinity that only rounding would refuse is found before anything is freed."""

    def infinite(tensor: StoredTensor, rng: np.random.Generator) -> NDArray[Any] | None:
        if tensor.name != "layers.1.ffn.experts.15.w3.weight":
            return None
        made = np.full(tensor.shape, 0x3F80, np.uint16)
        made[3, 4] = 0x7F80
        return made

    raw = config(
        n_routed_experts=16, num_nextn_predict_layers=0, quantization_config=None, expert_dtype=None
    )
    write_checkpoint(tmp_path / "raw", raw, formats("bf16", "bf16"), values=infinite)
    convert(tmp_path / "raw", tmp_path / "src", Request("hf"))
    before = tree(tmp_path / "src")
    request = Request("hf", 1, "fp4", lossy=True)
    with pytest.raises(NotANumberError):
        convert(tmp_path / "src", tmp_path / "out", request, move=True)
    assert tree(tmp_path / "src") == before and not (tmp_path / "out").exists()


def test_the_rehearsal_keeps_within_the_memory_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panels are those of the conversion, not the largest that there are."""
    seen: dict[str, int] = {}
    monkeypatch.setattr(moving, "digest_panels", lambda _, heights, *rest: seen.update(heights))
    with Checkpoint.open(write_hollow(tmp_path / "src", config(**WIDE))) as source:
        plan = make_plan(source, REQUEST)
        for values in (1 << 19, 1 << 21):
            moving.rehearse(plan, {}, Budget(2, values, 0), NoProgress())
            tall = [rows * source.specs[name].matrix[1] for name, rows in seen.items()]
            assert len(tall) == len(source.specs) and max(tall) == values
