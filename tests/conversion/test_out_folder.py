"""OUT: one run at a time, nothing of the user's is lost, and a finished output stays."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.conversion import journal
from dsv4_quant.conversion.journal import FOLDER, Workspace
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import BusyError, UnreadableError, UsageError, WriteError
from dsv4_quant.progress import NoProgress
from tests.conversion.checkpoints import tree
from tests.conversion.conftest import Crashes, make_source

REQUEST = Request("mp", 2, "fp8")


@pytest.fixture
def finished(crashes: Crashes, tmp_path: Path) -> Path:
    """A finished output that a test may change."""
    reference = crashes.source.parent / "finished"
    if not reference.exists():
        convert(crashes.source, reference, REQUEST)
        assert tree(reference) == crashes.reference
    return Path(shutil.copytree(reference, tmp_path / "finished"))


class TestTwoRunsAtOnce:
    def test_the_second_is_refused_and_disturbs_nothing(
        self, crashes: Crashes, tmp_path: Path
    ) -> None:
        refused = []

        class Second(NoProgress):
            def stage(self, text: str) -> None:
                if text == "converting":
                    with pytest.raises(BusyError, match="Another run is writing") as caught:
                        convert(crashes.source, tmp_path / "out", REQUEST, overwrite=True)
                    refused.append(caught.value)

        convert(crashes.source, tmp_path / "out", REQUEST, progress=Second())
        assert len(refused) == 1
        assert tree(tmp_path / "out") == crashes.reference

    def test_a_lock_in_a_folder_that_was_just_removed_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another run ends between this one's opening the lock and taking it."""

        def flock(fd: int, how: int) -> None:
            shutil.rmtree(tmp_path / "out" / FOLDER)
            real(fd, how)

        real = fcntl.flock
        monkeypatch.setattr(journal.fcntl, "flock", flock)
        with pytest.raises(BusyError):
            Workspace(tmp_path / "out")

    def test_a_filesystem_without_locks_is_no_reason_to_refuse(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(fd: int, how: int) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(journal.fcntl, "flock", flock)
        Workspace(tmp_path / "out").close()


class TestOutThatCannotBeUsed:
    def test_not_empty(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"not empty: it holds notes\.txt.*--overwrite"):
            convert(source, tmp_path / "out", REQUEST)
        assert list(tree(tmp_path / "out")) == ["notes.txt"]
        assert not (tmp_path / "out" / FOLDER).exists()

    def test_a_file(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(UsageError, match="not a folder"):
            convert(source, tmp_path / "out", REQUEST, overwrite=True)

    @pytest.mark.parametrize("place", ["src", "src/out", "src/../src", "link", "link/out", "."])
    def test_inside_or_around_the_source(self, place: str, source: Path, tmp_path: Path) -> None:
        src = shutil.copytree(source, tmp_path / "src")
        (tmp_path / "link").symlink_to(src)
        before = tree(tmp_path)
        with pytest.raises(UsageError, match="inside one another"):
            convert(src, tmp_path / place, REQUEST, overwrite=True)
        assert tree(tmp_path) == before

    def test_a_link_that_leads_nowhere(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="a symbolic link to nothing"):
            convert(source, tmp_path / "out", REQUEST)
        assert not (tmp_path / "nowhere").exists()

    def test_a_workspace_that_leads_elsewhere(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / FOLDER).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(WriteError, match="symbolic link"):
            convert(source, tmp_path / "out", REQUEST, overwrite=True)
        assert list(tree(tmp_path / "elsewhere")) == ["mine"]

    def test_folders_on_the_way_are_made(self, crashes: Crashes, tmp_path: Path) -> None:
        convert(crashes.source, tmp_path / "a" / "b" / "out", REQUEST)
        assert tree(tmp_path / "a" / "b" / "out") == crashes.reference

    def test_a_folder_of_a_small_files_name(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out" / "tokenizer.json").mkdir(parents=True)
        with pytest.raises(WriteError, match=r"refused.*tokenizer\.json"):
            convert(source, tmp_path / "out", REQUEST, overwrite=True)
        (tmp_path / "out" / "tokenizer.json").rmdir()
        convert(source, tmp_path / "out", REQUEST)


class TestUnfinishedOfAnotherPlan:
    def test_it_is_kept_unless_overwritten(self, crashes: Crashes, tmp_path: Path) -> None:
        out = tmp_path / "out"
        fault = crashes.at(len(crashes.calls) // 4, "kill")
        crashes.convert(out, request=["mp", 1, "keep", "keep"], fault=fault)
        before = tree(out)
        with pytest.raises(UsageError, match=r"unfinished conversion.*--overwrite"):
            convert(crashes.source, out, REQUEST)
        assert tree(out) == before
        convert(crashes.source, out, REQUEST, overwrite=True)
        assert tree(out) == crashes.reference


class TestOverwrite:
    def test_nothing_of_the_old_output_stays(self, finished: Path, crashes: Crashes) -> None:
        bare = finished.parent / "bare"
        shutil.copytree(crashes.source, bare)
        (bare / "a" / "b").mkdir(parents=True)
        for place in ("a", "a/b"):
            (bare / place / "x").touch()
        convert(bare, finished, REQUEST, overwrite=True)
        (finished / "notes.txt").write_text("mine")
        shutil.rmtree(bare / "a")
        shutil.rmtree(bare / "inference")
        (bare / "tokenizer.json").unlink()
        convert(bare, finished, Request("hf"), overwrite=True)
        convert(bare, finished.parent / "fresh", Request("hf"))
        (finished / "notes.txt").unlink()
        assert tree(finished) == tree(finished.parent / "fresh")
        assert not [path for path in finished.iterdir() if path.is_dir()]

    def test_an_output_without_manifest_too(self, finished: Path, crashes: Crashes) -> None:
        (finished / "dsv4-manifest.json").unlink()
        (finished / "model7-mp8.safetensors").write_bytes(b"old")
        convert(crashes.source, finished, REQUEST, overwrite=True)
        assert tree(finished) == crashes.reference

    def test_a_manifest_cannot_have_files_elsewhere_removed(
        self, finished: Path, crashes: Crashes, tmp_path: Path
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "generate.py").write_text("mine")
        shutil.rmtree(finished / "inference")
        (finished / "inference").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(WriteError, match="symbolic link"):
            convert(crashes.source, finished, REQUEST, overwrite=True)
        assert (tmp_path / "elsewhere" / "generate.py").read_text() == "mine"
        assert list(tree(tmp_path / "elsewhere")) == ["generate.py"]

    @pytest.mark.parametrize("action", ["kill", "power"])
    def test_killed_at_any_call_nothing_of_the_old_output_mixes_in(
        self, action: str, crashes: Crashes, tmp_path: Path
    ) -> None:
        old = tmp_path / "old"
        convert(crashes.source, old, Request("hf"))
        probe = Path(shutil.copytree(old, tmp_path / "probe"))
        calls = crashes.convert(probe, overwrite=True)["calls"]
        numbers = [n for n, call in enumerate(calls) if call != "pwritev"]
        for number in numbers[:24:3] + numbers[24::9]:
            out = Path(shutil.copytree(old, tmp_path / f"{number}"))
            call = calls[number]
            fault = {"call": call, "nth": calls[:number].count(call), "action": action}
            assert crashes.convert(out, overwrite=True, fault=fault) == {"signal": 9}
            outcome = crashes.convert(out, overwrite=True)
            assert "error" not in outcome, outcome
            assert tree(out) == crashes.reference

    def test_killed_before_it_began_the_old_output_comes_back_without_the_option(
        self, finished: Path, crashes: Crashes, tmp_path: Path
    ) -> None:
        fault = {"call": "replace", "nth": 3, "action": "kill"}
        request = ["mp", 1, "keep", "keep"]
        outcome = crashes.convert(finished, overwrite=True, request=request, fault=fault)
        assert outcome == {"signal": 9}
        assert not (finished / "dsv4-manifest.json").exists()
        outcome = crashes.convert(finished, request=request)
        assert "not empty" in outcome["text"]
        assert tree(finished) == crashes.reference

    def test_an_unfinished_run_over_an_old_output_leaves_none_of_its_own(
        self, finished: Path, crashes: Crashes
    ) -> None:
        """The first replaces the finished output and is killed when its weights are in place; the
        second replaces both.
        """
        fault = {"call": "replace", "nth": 14, "action": "kill"}
        outcome = crashes.convert(
            finished, overwrite=True, request=["hf", 1, "keep", "keep"], fault=fault
        )
        assert outcome == {"signal": 9}
        assert list(finished.glob("model-*.safetensors"))
        convert(crashes.source, finished, REQUEST, overwrite=True)
        assert tree(finished) == crashes.reference

    def test_killed_it_continues_with_and_without_the_option(
        self, finished: Path, crashes: Crashes
    ) -> None:
        for again in (True, False):
            crashes.convert(finished, overwrite=True, fault=crashes.after_cuts())
            assert not (finished / "dsv4-manifest.json").exists()
            assert crashes.convert(finished, overwrite=again)["resumed"] > 0
            assert tree(finished) == crashes.reference


class TestFinished:
    def test_the_same_command_again_checks_it_and_writes_nothing(
        self, finished: Path, crashes: Crashes
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
        report = convert(crashes.source, finished, REQUEST)
        assert report.resumed_bytes == report.bytes == crashes.bytes
        after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
        assert after == before

    def test_what_a_run_left_that_was_killed_at_its_very_end_goes(
        self, finished: Path, crashes: Crashes
    ) -> None:
        (finished / FOLDER).mkdir()
        (finished / FOLDER / "lock").touch()
        crashes.finishes(finished)

    @pytest.mark.parametrize("name", ["model1-mp2.safetensors", "tokenizer.json", "SHA256SUMS"])
    def test_a_damaged_one_is_not_taken_for_finished(
        self, name: str, finished: Path, crashes: Crashes
    ) -> None:
        raw = bytearray((finished / name).read_bytes())
        raw[-1] ^= 1
        (finished / name).write_bytes(raw)
        with pytest.raises(UsageError, match="not empty"):
            convert(crashes.source, finished, REQUEST)
        assert (finished / name).read_bytes() == raw

    def test_nor_one_of_another_source_or_form(
        self, finished: Path, crashes: Crashes, tmp_path: Path
    ) -> None:
        other = make_source(tmp_path / "other", seed=1)
        for src, request in ((other, REQUEST), (crashes.source, Request("mp", 2))):
            with pytest.raises(UsageError, match="not empty"):
                convert(src, finished, request)
        changed = Path(shutil.copytree(crashes.source, tmp_path / "changed"))
        (changed / "tokenizer.json").write_text('{"new": 1}')
        with pytest.raises(UsageError, match="not empty"):
            convert(changed, finished, REQUEST)
        assert tree(finished) == crashes.reference


class TestFilesBesideTheWeights:
    def carried(self, source: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "src"))

    def test_all_others_come_along(self, source: Path, tmp_path: Path) -> None:
        src = self.carried(source, tmp_path)
        (src / "README.md").write_text("# Modèle")
        (src / "assets" / "deep").mkdir(parents=True)
        (src / "assets" / "deep" / "模型.bin.txt").write_text("x")
        (src / ".git").mkdir()
        (src / ".git" / "config").write_text("hidden")
        (src / "pytorch_model.bin").write_bytes(b"a pickle")
        (src / "inference" / "config.json").write_text("{}")
        (src / "LICENSE").symlink_to(src / "README.md")
        report = convert(src, tmp_path / "out", Request("mp"))
        found = tree(tmp_path / "out")
        for name in ("README.md", "LICENSE", "assets/deep/模型.bin.txt", "tokenizer.json"):
            assert found[name] == tree(src)[name] == report.manifest.files[name].sha256
        assert (tmp_path / "out" / "inference" / "generate.py").exists()
        assert json.loads((tmp_path / "out" / "inference" / "config.json").read_bytes())["dim"]
        assert not (tmp_path / "out" / "LICENSE").is_symlink()
        assert not {".git/config", "pytorch_model.bin"} & found.keys()

    def test_a_snapshot_in_the_hubs_cache_is_all_links(
        self, crashes: Crashes, tmp_path: Path
    ) -> None:
        blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        for number, name in enumerate(tree(crashes.source)):
            shutil.copyfile(crashes.source / name, blobs / str(number))
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(blobs / str(number))
        convert(snapshot, tmp_path / "out", REQUEST)
        assert tree(tmp_path / "out") == crashes.reference

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda src: (src / "x").symlink_to("/etc/passwd"), "leaves the folder"),
            (lambda src: (src / "x").symlink_to("../elsewhere"), "missing"),
            (lambda src: (src / "x").symlink_to("/etc"), "link to a folder"),
            (lambda src: (src / "two\nlines").touch(), "name that cannot be written"),
            (lambda src: (src / "a\\b").touch(), "name that cannot be written"),
            (lambda src: (src / b"\xff.txt".decode("utf-8", "surrogateescape")).touch(), "name"),
        ],
    )
    def test_what_cannot_is_refused_before_any_work(
        self, make: Any, words: str, source: Path, tmp_path: Path
    ) -> None:
        src = self.carried(source, tmp_path)
        make(src)
        with pytest.raises(UnreadableError, match=words):
            convert(src, tmp_path / "out", REQUEST)
        assert not (tmp_path / "out").exists()
