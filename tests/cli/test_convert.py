"""``dsv4-quant convert`` and ``repack``."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsv4_quant.cli.conversion import parse_size
from dsv4_quant.cli.main import app
from dsv4_quant.conversion.journal import FOLDER
from tests.folders import copy_of, edited_file, golden, shard_with

TINY = golden("tiny-fp4")
W1 = "layers.2.ffn.experts.5.w1"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def plain(text: str) -> str:
    return " ".join(text.split())


def test_a_conversion_for_people(tmp_path: Path) -> None:
    done = run("convert", TINY, tmp_path / "out", "--gpus", 2, "--experts", "fp8")
    assert done.exit_code == 0, done.output
    said = plain(done.stdout)
    assert "308 weights in mp layout" in said
    assert "proved fp4_to_fp8: 288 tiles of 144 weights, all exact; widest" in said
    assert "2**6 of 2**14" in said
    assert "converting" in done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
        "config.json",
        "inference",
        "dsv4-manifest.json",
        "SHA256SUMS",
    }


def test_and_for_machines(tmp_path: Path) -> None:
    done = run("convert", TINY, tmp_path / "out", "--layout", "hf", "--json", "-")
    found = json.loads(done.stdout)
    manifest = json.loads((tmp_path / "out" / "dsv4-manifest.json").read_bytes())
    assert found["value_digest"] == manifest["value_digest"]
    assert {name: manifest["files"][name] for name in found["files"] if name in manifest["files"]}
    assert (found["layout"], found["gpus"], found["tensors"]) == ("hf", 1, 308)
    assert found["resumed_bytes"] == 0


def test_quiet_says_nothing(tmp_path: Path) -> None:
    done = run("convert", TINY, tmp_path / "out", "--gpus", 1, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_the_same_command_again_is_done_at_once(tmp_path: Path) -> None:
    args = ("convert", TINY, tmp_path / "out", "--gpus", 2)
    assert run(*args).exit_code == 0
    again = run(*args)
    assert again.exit_code == 0
    assert "by an earlier run" in again.stdout


def test_dry_run_writes_nothing_and_tells_all(tmp_path: Path) -> None:
    args = ("convert", TINY, tmp_path / "out", "--gpus", 4, "--experts", "fp8", "--dry-run")
    done = run(*args)
    assert done.exit_code == 0
    assert not list(tmp_path.iterdir())
    lines = [plain(line) for line in done.stdout.splitlines()]
    assert lines[0] == "layout mp for 4 GPUs"
    assert any(line.startswith("model3-mp4.safetensors ") for line in lines)
    assert any(line.startswith("fp4_to_fp8 144 exact; every tile") for line in lines)
    assert lines[-1] == "Nothing was written."
    found = json.loads(run(*args, "--json", "-").stdout)
    run(*args[:-1])
    held = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert found["files"] == held
    assert found["fits"] is True


def test_a_plan_that_does_not_fit_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    done = run("convert", TINY, tmp_path / "out", "--gpus", 1, "--dry-run")
    assert done.exit_code == 1
    assert "DOES NOT FIT" in done.stdout
    done = run("convert", TINY, tmp_path / "out", "--gpus", 1)
    assert done.exit_code == 2
    assert "1,000,000 are free" in plain(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpus", "3"], "Possible GPU counts: 1, 2, 4."),
        ([], "For how many GPUs?"),
        (["--layout", "mp"], "For how many GPUs?"),
        (["--gpus", "2", "--layout", "hf"], "--gpus splits over GPUs, --layout hf does not"),
        (["--gpus", "2", "--max-memory", "1MiB"], "too little for this checkpoint"),
        (["--gpus", "2", "--max-memory", "lots"], "is no size"),
        (["--gpus", "2", "--experts", "int4"], "Invalid value for '--experts'"),
        (["--gpus", "0"], "Invalid value for '--gpus'"),
    ],
)
def test_what_cannot_be_done_exits_with_2(args: list[str], words: str, tmp_path: Path) -> None:
    done = run("convert", TINY, tmp_path / "out", *args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in plain(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_value_that_would_be_lost_names_tensor_and_tile(tmp_path: Path) -> None:
    source = copy_of("tiny-fp4", tmp_path / "src")
    with edited_file(shard_with(source, f"{W1}.scale")) as tensors:
        dtype, shape, data = tensors[f"{W1}.scale"]
        tensors[f"{W1}.scale"] = dtype, shape, bytes([254]) + data[1:]
    done = run("convert", source, tmp_path / "out", "--gpus", 1, "--experts", "fp8")
    assert done.exit_code == 2
    said = plain(done.stderr)
    assert f"tensor {W1}.weight" in said
    assert "128x128 tile at row 0, column 0 (tile 0, 0)" in said
    assert not (tmp_path / "out").exists()
    assert run("convert", source, tmp_path / "out", "--gpus", 1).exit_code == 0


def test_repack_there_and_back(tmp_path: Path) -> None:
    digests = []
    steps = [("two", ["--gpus", "2"]), ("four", ["--gpus", "4"]), ("hf", ["--layout", "hf"])]
    source = TINY
    for name, args in steps:
        done = run("repack", source, tmp_path / name, *args, "--json", "-")
        assert done.exit_code == 0, done.stderr
        digests.append(json.loads(done.stdout)["value_digest"])
        source = tmp_path / name
    assert len(set(digests)) == 1
    assert "--experts" not in run("repack", "--help").stdout


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_it_soon_and_the_same_command_continues(presses: int, tmp_path: Path) -> None:
    slow = """
import time
from dsv4_quant.conversion import plan, stream
plan.cuts.__defaults__ = (1 << 20,)
stream.BATCH_BYTES = 1 << 14
real = stream.Stream._take
def take(*args):
    time.sleep(0.05)
    real(*args)
stream.Stream._take = take
from dsv4_quant.cli.main import main
main()
"""
    args = ["convert", str(TINY), str(tmp_path / "out"), "--gpus", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", slow, *args], stderr=subprocess.PIPE, text=True
    ) as process:
        journal = tmp_path / "out" / FOLDER / "journal"
        deadline = time.monotonic() + 30
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Interrupted." in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    done = run(*args, "--json", "-")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["resumed_bytes"] > 0
    assert not (tmp_path / "out" / FOLDER).exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("100", 100), (" 2 kB ", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
