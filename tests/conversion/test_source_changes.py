"""An output is made of one source, whatever happens to the source meanwhile or between two runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.conversion import run
from dsv4_quant.conversion.journal import FOLDER
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import SourceChangedError, UnreadableError
from tests.conversion.checkpoints import tree
from tests.conversion.conftest import Crashes, make_source
from tests.folders import edited_json, read_file, write_file

REQUEST = Request("mp", 2, "fp8")
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the source that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "src"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint with the same names, shapes and files."""
    return make_source(tmp_path_factory.mktemp("other") / "src", seed=1)


def overwrite(path: Path, by: Path) -> None:
    """The content of another file, at the same inode and with the same time of change."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(by.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def killed(crashes: Crashes, out: Path, source: Path, cuts: int = 3) -> None:
    outcome = crashes.convert(out, src=str(source), fault=crashes.after_cuts(cuts))
    assert outcome == {"signal": 9}


class TestBetweenTwoRuns:
    @pytest.mark.parametrize("cuts", [1, 3, 5])
    def test_another_source_in_its_place_is_converted_from_the_beginning(
        self, cuts: int, crashes: Crashes, copy: Path, other: Path, tmp_path: Path
    ) -> None:
        killed(crashes, tmp_path / "out", copy, cuts)
        overwrite(copy / FIRST, other / FIRST)
        overwrite(copy / SECOND, other / SECOND)
        outcome = crashes.convert(tmp_path / "out", src=str(copy))
        assert outcome["resumed"] == 0
        convert(other, tmp_path / "fresh", REQUEST)
        assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

    def test_one_byte_of_what_was_read_is_enough(
        self, crashes: Crashes, copy: Path, tmp_path: Path
    ) -> None:
        killed(crashes, tmp_path / "out", copy, 5)
        raw = bytearray((copy / FIRST).read_bytes())
        raw[-1000] ^= 1
        (copy / FIRST).write_bytes(raw)
        assert crashes.convert(tmp_path / "out", src=str(copy))["resumed"] == 0
        convert(copy, tmp_path / "fresh", REQUEST)
        assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

    def test_a_file_restored_from_a_backup_is_no_other_file(
        self, crashes: Crashes, copy: Path, source: Path, tmp_path: Path
    ) -> None:
        killed(crashes, tmp_path / "out", copy)
        for name in (FIRST, SECOND):
            (copy / name).unlink()
        outcome = crashes.convert(tmp_path / "out", src=str(copy))
        assert outcome["error"] == UnreadableError.__name__ or "index" in outcome["text"]
        for name in (FIRST, SECOND):
            shutil.copyfile(source / name, copy / name)
        outcome = crashes.convert(tmp_path / "out", src=str(copy))
        assert outcome["resumed"] > 0
        assert tree(tmp_path / "out") == crashes.reference

    def test_another_copy_of_the_source_continues(
        self, crashes: Crashes, copy: Path, tmp_path: Path
    ) -> None:
        killed(crashes, tmp_path / "out", copy)
        assert crashes.finishes(tmp_path / "out")["resumed"] > 0

    def test_another_config_is_another_conversion(
        self, crashes: Crashes, copy: Path, tmp_path: Path
    ) -> None:
        killed(crashes, tmp_path / "out", copy)
        with edited_json(copy / "config.json") as raw:
            raw["swiglu_limit"] = 7.0
        before = tree(tmp_path / "out")
        outcome = crashes.convert(tmp_path / "out", src=str(copy))
        assert "unfinished conversion of another checkpoint" in outcome["text"]
        assert tree(tmp_path / "out") == before


def other_scales(source: Path, path: Path) -> None:
    """The shard with the experts; the last weight has other scales and the same codes."""
    loose = read_file(source / SECOND)
    for name, (dtype, shape, data) in loose.items():
        if name.endswith("ffn.shared_experts.w3.scale"):
            loose[name] = (dtype, shape, bytes(max(byte, 2) - 1 for byte in data))
    assert loose != read_file(source / SECOND)
    write_file(path, loose)


class TestScalesAndCodesAreReadAtDifferentTimes:
    """In mp files all scales stand before the codes: a source may change in between."""

    @pytest.fixture
    def changed(self, source: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
        """The other shard, and what a conversion makes of a source that has it."""
        whole = Path(shutil.copytree(source, tmp_path / "changed"))
        other_scales(source, whole / SECOND)
        assert (whole / SECOND).stat().st_size == (source / SECOND).stat().st_size
        convert(whole, tmp_path / "fresh", REQUEST)
        return whole / SECOND, tree(tmp_path / "fresh")

    @pytest.mark.parametrize("cuts", [1, 2, 3, 4, 5])
    def test_between_two_runs(
        self,
        cuts: int,
        changed: tuple[Path, dict[str, str]],
        crashes: Crashes,
        copy: Path,
        tmp_path: Path,
    ) -> None:
        killed(crashes, tmp_path / "out", copy, cuts)
        overwrite(copy / SECOND, changed[0])
        assert crashes.convert(tmp_path / "out", src=str(copy)).get("error") is None
        assert tree(tmp_path / "out") == changed[1]

    @pytest.mark.parametrize("part", [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7])
    def test_while_it_runs(
        self,
        part: float,
        changed: tuple[Path, dict[str, str]],
        crashes: Crashes,
        copy: Path,
        tmp_path: Path,
    ) -> None:
        number = int(part * len(crashes.calls))
        fault = crashes.at(number, "rewrite") | {"path": str(copy / SECOND), "by": str(changed[0])}
        outcome = crashes.convert(tmp_path / "out", src=str(copy), fault=fault)
        if "error" in outcome:
            assert outcome["error"] == SourceChangedError.__name__
            assert not (tmp_path / "out").exists()
        else:
            assert tree(tmp_path / "out") == changed[1]


class TestMeanwhile:
    def fault(self, crashes: Crashes, part: float, action: str, **more: Any) -> dict[str, Any]:
        return {**crashes.at(int(part * len(crashes.calls)), action), **more}

    @pytest.mark.parametrize("part", [0.4, 0.6, 0.8])
    def test_a_rewritten_file_voids_what_was_read_of_it(
        self, part: float, crashes: Crashes, copy: Path, other: Path, tmp_path: Path
    ) -> None:
        path, by = str(copy / FIRST), str(other / FIRST)
        fault = self.fault(crashes, part, "rewrite", path=path, by=by)
        outcome = crashes.convert(tmp_path / "out", src=str(copy), fault=fault)
        assert outcome["error"] == SourceChangedError.__name__
        assert "what was written is void" in outcome["text"]
        assert not (tmp_path / "out").exists()

    def test_a_file_rewritten_with_its_own_content_is_read_again_and_believed(
        self, crashes: Crashes, copy: Path, source: Path, tmp_path: Path
    ) -> None:
        path, by = str(copy / FIRST), str(source / FIRST)
        fault = self.fault(crashes, 0.6, "rewrite", path=path, by=by)
        outcome = crashes.convert(tmp_path / "out", src=str(copy), fault=fault)
        assert outcome["bytes"] == crashes.bytes
        assert tree(tmp_path / "out") == crashes.reference

    @pytest.mark.parametrize("part", [0.0, 0.3, 0.8])
    def test_a_file_that_vanishes_and_comes_back(
        self, part: float, crashes: Crashes, copy: Path, source: Path, tmp_path: Path
    ) -> None:
        fault = self.fault(crashes, part, "vanish", path=str(copy / SECOND))
        outcome = crashes.convert(tmp_path / "out", src=str(copy), fault=fault)
        assert outcome["error"] == SourceChangedError.__name__
        assert "Restore it and run the same command again" in outcome["text"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
        shutil.copyfile(source / SECOND, copy / SECOND)
        outcome = crashes.convert(tmp_path / "out", src=str(copy))
        assert outcome["bytes"] == crashes.bytes
        assert tree(tmp_path / "out") == crashes.reference

    def test_a_file_cut_short(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cut(*args: Any, **options: Any) -> Any:
            os.truncate(copy / SECOND, (copy / SECOND).stat().st_size // 2)
            return check(*args, **options)

        check = run.check_room
        monkeypatch.setattr(run, "check_room", cut)
        with pytest.raises(SourceChangedError, match="changed since its header was read"):
            convert(copy, tmp_path / "out", REQUEST)

    def test_a_file_exchanged_between_its_header_and_its_data(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as before, with the same tensors in another order: its offsets are others."""

        def exchange(*args: Any) -> Any:
            tensors = read_file(copy / FIRST)
            order = sorted(tensors, key=lambda name: (len(tensors[name][2]), name), reverse=True)
            write_file(copy / "new", {name: tensors[name] for name in order})
            assert (copy / "new").stat().st_size == (copy / FIRST).stat().st_size
            (copy / "new").replace(copy / FIRST)
            return make(*args)

        make = run.make_plan
        monkeypatch.setattr(run, "make_plan", exchange)
        with pytest.raises(SourceChangedError, match="what was written is void"):
            convert(copy, tmp_path / "out", REQUEST)
        assert not (tmp_path / "out").exists()
