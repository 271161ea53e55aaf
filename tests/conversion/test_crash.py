"""Whatever ends a conversion, the same command again gives the same bytes and leaves no trace."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS, read_manifest
from dsv4_quant.conversion import target
from dsv4_quant.conversion.journal import FOLDER
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import DiskSpaceError, WriteError
from tests.conversion.checkpoints import tree
from tests.conversion.conftest import Crashes, Disk


def chosen(calls: list[str], first: int, every: int) -> list[int]:
    """Numbers of calls: every so many-th, but of the many writes only every third of those."""
    writes = [n for n, call in enumerate(calls) if call == "pwritev"][:-4]
    others = [n for n, call in enumerate(calls) if call != "pwritev"]
    return sorted(writes[first :: 3 * every] + others[first::every])


def looks_honest(out: Path) -> None:
    """What carries a sign of being complete is complete."""
    signs = [out / name for name in (SUMS, MANIFEST, "config.json")]
    if not any(sign.exists() for sign in signs):
        return
    assert len(list(out.glob("model*.safetensors"))) == 2
    if (out / MANIFEST).exists():
        found = tree(out)
        listed = read_manifest(out / MANIFEST).files
        assert {name: found[name] for name in listed} == {n: r.sha256 for n, r in listed.items()}


@pytest.mark.parametrize("action", ["kill", "power"])
def test_killed_at_any_call(action: str, crashes: Crashes, tmp_path: Path) -> None:
    resumed = 0
    for number in chosen(crashes.calls, 1 if action == "kill" else 2, 4):
        out = tmp_path / f"{number}"
        assert crashes.convert(out, fault=crashes.at(number, action)) == {"signal": 9}
        looks_honest(out)
        resumed += crashes.finishes(out)["resumed"]
    assert resumed > 4 * crashes.bytes  # so most of the runs continued


def test_the_last_calls_one_by_one(crashes: Crashes, tmp_path: Path) -> None:
    for number in range(len(crashes.calls) - 12, len(crashes.calls)):
        out = tmp_path / f"{number}"
        assert crashes.convert(out, fault=crashes.at(number, "power")) == {"signal": 9}
        looks_honest(out)
        assert crashes.finishes(out)["resumed"] == crashes.bytes


def test_killed_again_and_again(crashes: Crashes, tmp_path: Path) -> None:
    chance = random.Random(3)
    for chain in range(3):
        out = tmp_path / f"{chain}"
        for _ in range(5):
            number = chance.randrange(20, len(crashes.calls))
            crashes.convert(out, fault=crashes.at(number, chance.choice(["kill", "power"])))
        crashes.finishes(out)


def test_killed_at_random_times(crashes: Crashes, tmp_path: Path) -> None:
    chance = random.Random(4)
    for number in range(10):
        out = tmp_path / f"{number}"
        outcome = crashes.convert(out, seconds=chance.uniform(0, 0.4))
        assert outcome.get("signal") == 9 or outcome["bytes"] == crashes.bytes
        crashes.finishes(out)


@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "interrupt"])
def test_an_error_at_any_call(action: str, crashes: Crashes, tmp_path: Path) -> None:
    expected = "KeyboardInterrupt" if action == "interrupt" else "WriteError"
    for number in chosen(crashes.calls, {"ENOSPC": 0, "EIO": 2, "interrupt": 4}[action], 7):
        out = tmp_path / f"{number}"
        outcome = crashes.convert(out, fault=crashes.at(number, action))
        assert outcome.get("error") in (expected, None)
        if out.exists():
            looks_honest(out)
        crashes.finishes(out)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "fsync", "replace", "write"])
def test_a_disk_that_stays_broken(call: str, crashes: Crashes, tmp_path: Path) -> None:
    numbers = [n for n, name in enumerate(crashes.calls) if name == call]
    number = numbers[len(numbers) // 2]
    fault = crashes.at(number, "ENOSPC", lasting=True)
    outcome = crashes.convert(tmp_path / "out", fault=fault)
    assert outcome["error"] == "WriteError"
    assert "No space left on device" in outcome["text"]
    assert "same command again" in outcome["text"]
    assert not (tmp_path / "out" / SUMS).exists()
    crashes.finishes(tmp_path / "out")


def partial(crashes: Crashes, out: Path) -> Path:
    """The workspace of a run that was killed after three cuts."""
    assert crashes.convert(out, fault=crashes.after_cuts()) == {"signal": 9}
    return out / FOLDER


class TestWhatLiesThereIsJudgedByContent:
    def test_a_byte_that_changed_in_what_was_written(
        self, crashes: Crashes, tmp_path: Path
    ) -> None:
        for name in ("model0-mp2.safetensors", "model1-mp2.safetensors"):
            out = tmp_path / name
            path = partial(crashes, out) / name
            flip(path, 100_000)
            assert crashes.finishes(out)["resumed"] < 400_000

    def test_files_that_grew_shrank_or_vanished(self, crashes: Crashes, tmp_path: Path) -> None:
        grown, shrunk, gone = (partial(crashes, tmp_path / name) for name in "abc")
        with (grown / "model0-mp2.safetensors").open("ab") as file:
            file.write(b"more")
        os.truncate(shrunk / "model1-mp2.safetensors", 1000)
        (gone / "model1-mp2.safetensors").unlink()
        assert crashes.finishes(grown.parent)["resumed"] > 0
        assert crashes.finishes(shrunk.parent)["resumed"] == 0
        assert crashes.finishes(gone.parent)["resumed"] == 0

    def test_every_byte_of_the_journal_is_covered(self, crashes: Crashes, tmp_path: Path) -> None:
        journal = partial(crashes, tmp_path / "first") / "journal"
        ends = [n for n, byte in enumerate(journal.read_bytes()) if byte == ord("\n")]
        assert len(ends) > 2
        middle = (ends[1] + ends[2]) // 2
        for line, place in enumerate((ends[0] // 2, ends[0] + 5, ends[1] - 9, middle)):
            out = tmp_path / f"{line}"
            flip(partial(crashes, out) / "journal", place)
            crashes.finishes(out)

    def test_a_journal_that_was_cut(self, crashes: Crashes, tmp_path: Path) -> None:
        for number, keep in enumerate((0, 10, 1000, 1500)):
            out = tmp_path / f"{number}"
            os.truncate(partial(crashes, out) / "journal", keep)
            crashes.finishes(out)

    def test_a_file_at_its_place_that_changed(self, crashes: Crashes, tmp_path: Path) -> None:
        placed = [n for n, call in enumerate(crashes.calls) if call == "replace"]
        for number in placed[2:-1]:
            out = tmp_path / f"{number}"
            crashes.convert(out, fault=crashes.at(number + 1, "kill"))
            flip(out / "model1-mp2.safetensors", 150_000)
            again = crashes.convert(out, fault={"call": "pwritev", "nth": 0, "action": "kill"})
            assert again == {"signal": 9}  # it was being made again ...
            assert not (out / MANIFEST).exists()  # ... and does not look complete meanwhile
            assert not (out / "config.json").exists()
            assert not (out / "model1-mp2.safetensors").exists()
            crashes.finishes(out)

    def test_a_partial_file_that_is_removed_meanwhile(
        self, crashes: Crashes, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        victim = str(out / FOLDER / "model1-mp2.safetensors")
        number = crashes.calls.index("fdatasync") + 3
        outcome = crashes.convert(out, fault={**crashes.at(number, "vanish"), "path": victim})
        assert outcome["error"] == "WriteError"
        assert not (out / MANIFEST).exists()
        crashes.finishes(out)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


class TestFullDisk:
    REQUEST = Request("mp", 2, "fp8")

    def test_it_is_found_before_any_work(self, crashes: Crashes, disk: Disk) -> None:
        disk.resize(3 << 20)
        with pytest.raises(DiskSpaceError, match=r"needs [\d,]+ bytes, 3,145,728 are free"):
            convert(crashes.source, disk.place / "out", self.REQUEST)
        assert not list(disk.place.iterdir())

    @pytest.mark.parametrize("reserved", [True, False])
    def test_it_fills_up_meanwhile(
        self,
        reserved: bool,
        crashes: Crashes,
        disk: Disk,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        disk.resize(3 << 20)
        with monkeypatch.context() as patch:
            patch.setattr(target, "disk_room", lambda *_, **__: (0, 1))
            if not reserved:
                patch.setattr("dsv4_quant.conversion.files._allocate", lambda fd, size: None)
            with pytest.raises(WriteError, match=r"No space left.*Make room and run the same"):
                convert(crashes.source, disk.place / "out", self.REQUEST)
        assert [path.name for path in (disk.place / "out").iterdir()] == [FOLDER]
        disk.resize(9 << 20)
        crashes.finishes(disk.place / "out")


def test_the_journal_says_what_was_done(crashes: Crashes, tmp_path: Path) -> None:
    lines = (partial(crashes, tmp_path / "out") / "journal").read_bytes().splitlines()
    first, *cuts = (json.loads(line.split(b" ", 1)[1]) for line in lines)
    assert first["plan"]["gpus"] == 2
    assert set(first["stamps"]) == {path.name for path in crashes.source.glob("*.safetensors")}
    steps = [cut["steps"] for cut in cuts]
    assert steps == sorted(set(steps))
