"""verify, digest and fingerprint by several processes: what one process says, and as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.team.launch import PORTS
from tests.folders import copy_of, edited_file, golden, shard_with
from tests.team.conftest import REPOSITORY, Ended, Processes
from tests.team.driver import is_free

WEIGHT = "layers.1.attn.wkv.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Path:
    """A checkpoint with a manifest."""
    folder = tmp_path_factory.mktemp("sound")
    root = copy_of("tiny-fp4", folder / "src")
    assert processes.run(0, "manifest", root, folder=folder).codes == [0]
    return root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, sound: Path, processes: Processes) -> Path:
    """Two ranks' files with errors of each level: another byte, a NaN, another copy, a stranger."""
    folder = tmp_path_factory.mktemp("damaged")
    argv = ("convert", sound, folder / "mp", "--gpus", "2")
    assert processes.run(0, *argv, folder=folder).codes == [0]
    for rank in range(2):
        with edited_file(folder / "mp" / f"model{rank}-mp2.safetensors") as tensors:
            dtype, shape, data = tensors[WEIGHT]
            tensors[WEIGHT] = dtype, shape, (b"\x01" if rank else b"\x7f") + data[1:]
    (folder / "mp" / "stranger.bin").write_bytes(b"?")
    return folder / "mp"


def untimed(value: Any) -> Any:
    """A result without what differs: times, and what of the layers each process reads again."""
    if isinstance(value, dict):
        left_out = {"seconds", "reading"} | (
            {"bytes"} if value.get("level") == "forward" else set()
        )
        return {key: untimed(one) for key, one in value.items() if key not in left_out}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def of_one_and_of(
    size: int, processes: Processes, folder: Path, *argv: str | Path
) -> tuple[Ended, Any]:
    """The same command by one process and by several must give the same JSON."""
    found = []
    for count in (1, size):
        ended = processes.run(count, *argv, "--json", f"of{count}.json", folder=folder)
        assert len(set(ended.codes)) == 1, ended
        found.append(
            (ended.codes[0], untimed(json.loads((folder / f"of{count}.json").read_text())))
        )
    assert found[0] == found[1]
    return ended, found[1][1]


@pytest.mark.parametrize("size", [2, 4])
def test_verify_finds_the_same(
    size: int, damaged: Path, sound: Path, processes: Processes, tmp_path: Path
) -> None:
    argv = ("verify", damaged, "--against", sound, "--junit", "findings.xml")
    ended, report = of_one_and_of(size, processes, tmp_path, *argv)
    assert ended.codes == [1] * size and ended.out[1:] == [""] * (size - 1)
    checks = {finding["check"] for finding in report["findings"]}
    assert {"files", "bytes", "numbers", "replicas", "against"} <= checks
    assert (tmp_path / "findings.xml").exists()


def test_verify_what_holds(sound: Path, processes: Processes, tmp_path: Path) -> None:
    ended, report = of_one_and_of(3, processes, tmp_path, "verify", sound)
    assert ended.codes == [0] * 3 and report["value_digest"] is not None


def test_digest(sound: Path, processes: Processes, tmp_path: Path) -> None:
    ended, _ = of_one_and_of(3, processes, tmp_path, "digest", sound, "--tensors")
    alone = processes.run(1, "digest", sound, "--tensors", folder=tmp_path)
    assert ended.out == [alone.out[0], "", ""]


def test_a_nan_has_no_digest(tmp_path: Path, processes: Processes) -> None:
    root = copy_of("tiny-fp4", tmp_path / "src")
    with edited_file(shard_with(root, WEIGHT)) as tensors:
        dtype, shape, data = tensors[WEIGHT]
        tensors[WEIGHT] = dtype, shape, b"\x7f" + data[1:]
    for size in (1, 3):
        ended = processes.run(size, "digest", root, folder=tmp_path)
        assert ended.codes == [1] * size and ended.late < 5
        assert WEIGHT in ended.all_said_at_once()


@pytest.mark.parametrize("size", [2, 4])
def test_fingerprint(size: int, sound: Path, processes: Processes, tmp_path: Path) -> None:
    prompts = [[1, 2, 3], list(range(90)), [7]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    for count in (1, size):
        argv = ("fingerprint", sound, "--prompts", "prompts.json", "--output", f"F{count}.json")
        assert processes.run(count, *argv, folder=tmp_path).codes == [0] * count
    assert (tmp_path / "F1.json").read_bytes() == (tmp_path / f"F{size}.json").read_bytes()
    argv = ("verify", sound, "--fingerprint", "F1.json")
    ended, report = of_one_and_of(size, processes, tmp_path, *argv)
    assert ended.codes == [0] * size and "gate bit" in report["forward"]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_process_ends_a_check(
    rank: int, sound: Path, processes: Processes, tmp_path: Path
) -> None:
    argv = ("fingerprint", sound, "--output", "F.json")
    killed = {"rank": rank, "said": "forward pass"}
    ended = processes.run(3, *argv, folder=tmp_path, killed=killed)
    assert ended.codes == [-9 if other == rank else 2 for other in range(3)]
    assert ended.late < 5 and f"Process {rank} of 3" in ended.all_said_at_once()
    assert not list(tmp_path.glob("F.json*"))


def test_another_folder_under_the_same_name(
    sound: Path, processes: Processes, tmp_path: Path
) -> None:
    copy_of("tiny-fp4", tmp_path / "here" / "src")
    copy_of("tiny-base", tmp_path / "there" / "src")
    folders = {"0": str(tmp_path / "here"), "1": str(tmp_path / "there")}
    for argv in (("digest", "src"), ("verify", "src"),
                 ("convert", "src", tmp_path / "out", "--gpus", "1")):  # fmt: skip
        ended = processes.run(2, *argv, folder=tmp_path, folders=folders)
        assert ended.codes == [2, 2] and not (tmp_path / "out").exists()
        assert "Process 1 sees another checkpoint" in ended.all_said_at_once()


def test_wrong_usage_is_told_once(processes: Processes, tmp_path: Path) -> None:
    ended = processes.run(3, "digest", "--nonsense", folder=tmp_path)
    assert ended.codes == [2] * 3 and ended.said.count("No such option") == 1
    ended = processes.run(3, "digest", tmp_path / "nowhere", folder=tmp_path)
    assert ended.codes == [2] * 3 and "nowhere" in ended.all_said_at_once()


def test_torchrun(sound: Path, processes: Processes, tmp_path: Path) -> None:
    alone = processes.run(1, "digest", sound, folder=tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "-m", "dsv4_quant", "digest", str(sound)]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out[0]


def test_srun(processes: Processes, tmp_path: Path) -> None:
    """Processes as srun starts them; the job's number is chosen so that its port is free."""
    alone = processes.run(1, "digest", golden("tiny-fp4"), folder=tmp_path)
    port = next(port for port in PORTS if is_free(port))
    step = {
        "SLURM_JOB_ID": str(port - PORTS.start),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    command = [sys.executable, "-m", "dsv4_quant", "digest", str(golden("tiny-fp4"))]
    tasks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **step, "SLURM_PROCID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert said == [alone.out[0], ""]
