"""Conversions by several processes: the same bytes as by one, whatever happens to one of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.conversion.journal import FOLDER, Workspace
from dsv4_quant.errors import BusyError
from tests.conversion.checkpoints import config, formats, tree, write_checkpoint
from tests.folders import edited_file
from tests.team.conftest import Processes

CUT = 1 << 16
FP8 = ("--experts", "fp8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and an mtp block, a shard for each; a file beside them."""
    root = tmp_path_factory.mktemp("team") / "src"
    raw = config(num_attention_heads=8, index_n_heads=8, o_groups=4)
    shards = lambda tensor: -1 if tensor.spec.layer is None else tensor.spec.layer  # noqa: E731
    write_checkpoint(root, raw, shard=shards)
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 with float32 scales: on the way to BF16 they can be rounded."""
    root = tmp_path_factory.mktemp("team") / "base"
    rng = np.random.default_rng(1)
    return write_checkpoint(
        root,
        config(expert_dtype="fp8"),
        formats("fp8", "fp8", "f32"),
        values=lambda tensor, _: (
            rng.uniform(1e-4, 1e-3, tensor.shape).astype(np.float32) if tensor.is_scale else None
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def alone(
    source: Path, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What one process makes for four GPUs."""
    folder = tmp_path_factory.mktemp("alone")
    argv = ("convert", source, folder / "out", "--gpus", "4", *FP8)
    ended = processes.run(0, *argv, folder=folder)
    assert ended.codes == [0], ended
    return tree(folder / "out")


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ("--gpus", "4", *FP8)),
        (4, ("--gpus", "4")),
        (3, ("--layout", "hf", *FP8)),
        (2, ("--gpus", "1")),
    ],
    ids=["2 for 4 GPUs", "4 for 4 GPUs", "3 for hf", "more than there are files"],
)
def test_the_same_bytes(
    size: int, options: tuple[str, ...], source: Path, processes: Processes, tmp_path: Path
) -> None:
    for count, name in ((1, "one"), (size, "many")):
        argv = ("convert", source, tmp_path / name, *options)
        ended = processes.run(count, *argv, folder=tmp_path, cut=CUT)
        assert ended.codes == [0] * count, ended
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    assert "weights in" in ended.out[0] and ended.out[1:] == [""] * (size - 1)
    assert ended.err[1:] == [""] * (size - 1)


def test_rounded_values_are_counted_once(base: Path, processes: Processes, tmp_path: Path) -> None:
    options = ("--gpus", "2", "--experts", "fp4", "--dense", "bf16", "--lossy")
    for count, name in ((1, "one"), (2, "many")):
        argv = ("convert", base, tmp_path / name, *options)
        ended = processes.run(count, *argv, folder=tmp_path, cut=CUT)
        assert ended.codes == [0] * count, ended
    assert '"requantised"' in (tmp_path / "one" / MANIFEST).read_text()
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_back_to_one_checkpoint(processes: Processes, source: Path, tmp_path: Path) -> None:
    for step in (("convert", source, tmp_path / "mp", "--gpus", "2"),
                 ("repack", tmp_path / "mp", tmp_path / "hf", "--layout", "hf"),
                 ("repack", source, tmp_path / "direct", "--layout", "hf")):  # fmt: skip
        assert processes.run(2, *step, folder=tmp_path).codes == [0, 0]
    weights = "*.safetensors"
    made, direct = (sorted((tmp_path / name).glob(weights)) for name in ("hf", "direct"))
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in direct]


def kill(rank: int, cuts: int = 2) -> dict[str, Any]:
    """SIGKILL when that process has written so many cuts down."""
    return {str(rank): {"call": "write", "nth": cuts, "action": "kill"}}


class TestAKilledProcess:
    @pytest.mark.parametrize(("size", "rank", "then"), [(2, 1, 2), (2, 0, 1), (4, 3, 3)])
    def test_the_next_run_continues(
        self,
        size: int,
        rank: int,
        then: int,
        source: Path,
        alone: dict[str, str],
        processes: Processes,
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "out"
        argv = ("convert", source, out, "--gpus", "4", *FP8)
        common: dict[str, Any] = {"folder": tmp_path, "cut": CUT}
        ended = processes.run(size, *argv, faults=kill(rank), **common)
        assert ended.codes == [-9 if other == rank else 2 for other in range(size)]
        assert ended.late < 5
        said = ended.all_said_at_once()
        assert f"Process {rank} of {size}" in said and "has ended without a word" in said
        assert [path.name for path in out.iterdir()] == [FOLDER]
        journals = {path.name for path in (out / FOLDER).glob("journal*")}
        assert journals == {f"journal-{part}-of-{size}" for part in range(size)}
        again = processes.run(then, *argv, **common)
        assert again.codes == [0] * then, again
        assert "of it by an earlier run" in again.out[0]
        assert tree(out) == alone

    @pytest.mark.parametrize(("call", "nth"), [("replace", 3), ("replace", 9), ("unlink", 2)])
    def test_the_first_while_it_finishes(
        self,
        call: str,
        nth: int,
        source: Path,
        alone: dict[str, str],
        processes: Processes,
        tmp_path: Path,
    ) -> None:
        """Between two files' moves, before SHA256SUMS, between the removal of two journals."""
        out = tmp_path / "out"
        argv = ("convert", source, out, "--gpus", "4", *FP8)
        fault = {"0": {"call": call, "nth": nth, "action": "kill"}}
        ended = processes.run(2, *argv, folder=tmp_path, faults=fault)
        assert ended.codes[0] == -9 and (out / FOLDER).exists()
        assert (out / "SHA256SUMS").exists() == (call == "unlink")
        again = processes.run(2, *argv, folder=tmp_path)
        assert again.codes == [0, 0], again
        assert "of it by an earlier run" in again.out[0]
        assert tree(out) == alone and not (out / FOLDER).exists()

    def test_another_number_of_processes_goes_on_with_one_ones_work(
        self, source: Path, alone: dict[str, str], processes: Processes, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        argv = ("convert", source, out, "--gpus", "4", *FP8)
        common: dict[str, Any] = {"folder": tmp_path, "cut": CUT}
        assert processes.run(1, *argv, faults=kill(0, 4), **common).codes == [-9]
        ended = processes.run(3, *argv, faults=kill(2, 1), **common)
        assert ended.codes == [2, 2, -9]
        journals = {path.name for path in (out / FOLDER).glob("journal*")}
        assert journals == {f"journal-{part}-of-3" for part in range(3)}
        again = processes.run(2, *argv, **common)
        assert again.codes == [0] * 2 and "of it by an earlier run" in again.out[0]
        assert tree(out) == alone

    def test_move_does_not_continue_parts(
        self, source: Path, alone: dict[str, str], processes: Processes, tmp_path: Path
    ) -> None:
        """A part does not know what the others still need of a file."""
        mine, out = tmp_path / "mine", tmp_path / "out"
        shutil.copytree(source, mine)
        assert processes.run(1, "manifest", mine, folder=tmp_path).codes == [0]
        argv = ("convert", mine, out, "--gpus", "4", *FP8)
        processes.run(2, *argv, folder=tmp_path, faults=kill(1), cut=CUT)
        before = tree(mine)
        ended = processes.run(1, *argv, "--move", folder=tmp_path)
        assert ended.codes == [2] and "begun by several processes" in ended.all_said_at_once()
        assert tree(mine) == before
        assert processes.run(1, *argv, folder=tmp_path).codes == [0]

    def test_other_work_is_not_continued(
        self, source: Path, processes: Processes, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        argv = ("convert", source, out, "--gpus", "4")
        processes.run(2, *argv, *FP8, folder=tmp_path, faults=kill(1), cut=CUT)
        ended = processes.run(2, *argv, folder=tmp_path)
        assert ended.codes == [2, 2]
        assert "an unfinished conversion of another checkpoint" in ended.all_said_at_once()
        ended = processes.run(2, *argv, "--overwrite", folder=tmp_path)
        assert ended.codes == [0, 0] and not (out / FOLDER).exists()


def test_a_nan_that_one_process_reads(processes: Processes, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    name = "layers.1.attn.wkv.weight"
    shard = next(
        path for path in broken.glob("*.safetensors") if name.encode() in path.read_bytes()
    )
    with edited_file(shard) as tensors:
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, shape, b"\x7f" + data[1:]
    argv = ("convert", broken, tmp_path / "out", "--layout", "hf", "--experts", "fp8")
    for size in (1, 4):
        ended = processes.run(size, *argv, folder=tmp_path)
        assert ended.codes == [2] * size and ended.late < 5
        assert name in ended.all_said_at_once()
        assert not (tmp_path / "out").exists(), "there is nothing to continue"


def test_out_must_be_shared(processes: Processes, source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    ended = processes.run(
        2, "convert", source, "out", "--gpus", "2",
        folder=tmp_path,
        folders={"1": str(tmp_path / "elsewhere")},
        patches={"dsv4_quant.conversion.meeting.SEEING": 0.3},
    )  # fmt: skip
    assert ended.codes == [2, 2]
    said = ended.all_said_at_once()
    assert "Process 1 does not see in OUT" in said and "a filesystem that they share" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "elsewhere" / "out").exists()


def test_no_other_run_comes_in_until_the_last_has_left(tmp_path: Path) -> None:
    first = Workspace(tmp_path / "out")
    first.share()
    second = Workspace(tmp_path / "out", join=True)
    for one in (first, second):
        with pytest.raises(BusyError):
            Workspace(tmp_path / "out")
        one.close()
    Workspace(tmp_path / "out").close()
