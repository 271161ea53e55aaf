"""A process that runs conversions in children which can be killed (``crash_driver``)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.checkpoints import config, tree, write_checkpoint

Outcome = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]


class Crashes:
    """One source, its finished conversion to compare with, and a driver for more runs."""

    def __init__(self, source: Path, root: Path, run: Callable[[dict[str, Any]], Outcome]) -> None:
        self.source, self._run = source, run
        outcome = self.convert(root / "reference", here=True)
        self.calls: list[str] = outcome["calls"]
        self.reference = tree(root / "reference")
        self.bytes: int = outcome["bytes"]

    def convert(self, out: Path, **job: Any) -> Outcome:
        """One run; ``fault``, ``seconds``, ``overwrite``, ``request``, ``src`` change it."""
        usual = {"src": str(self.source), "request": ["mp", 2, "fp8", "keep"], "cut": 1 << 18}
        return self._run({**usual, "out": str(out), **job})

    def at(self, number: int, action: str, *, lasting: bool = False) -> dict[str, Any]:
        """The fault that strikes at that call of the reference run.

        Calls are told by their names and counted for each: threads take turns as they like.
        """
        call = self.calls[number]
        nth = self.calls[:number].count(call)
        return {"call": call, "nth": nth, "action": action, "lasting": lasting}

    def after_cuts(self, count: int = 3) -> dict[str, Any]:
        """A kill when so many cuts are in the journal; there is something to continue from."""
        return {"call": "write", "nth": count, "action": "kill"}

    def finishes(self, out: Path) -> Outcome:
        """The same command again must give the same bytes and leave nothing else."""
        outcome = self.convert(out)
        assert outcome.get("error") is None, outcome
        assert tree(out) == self.reference
        assert {path.name for path in out.rglob("*") if path.is_dir()} == {"inference"}
        return outcome


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer in two shards; the vocabulary makes weights of two digest leaves, two panels."""
    return make_source(tmp_path_factory.mktemp("source") / "src")


def make_source(root: Path, seed: int = 0) -> Path:
    """The same names, shapes and files for every seed."""
    raw = config(
        vocab_size=8448,
        num_hidden_layers=1,
        compress_ratios=[128],
        num_nextn_predict_layers=0,
        n_routed_experts=2,
    )
    write_checkpoint(
        root, raw, seed=seed, shard=lambda tensor: -1 if tensor.spec.layer is None else 0
    )
    (root / "tokenizer.json").write_text("{}")
    (root / "inference").mkdir()
    (root / "inference" / "generate.py").write_text("pass\n")
    return root


@pytest.fixture(scope="session")
def driver() -> Iterator[Callable[[dict[str, Any]], Outcome]]:
    """A function that has a job done by the driver."""
    command = [sys.executable, "-m", "tests.conversion.crash_driver"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(job: dict[str, Any]) -> Outcome:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            outcome: Outcome = json.loads(process.stdout.readline())
            assert outcome.get("error") != "crash", outcome
            assert outcome.get("signal") in (None, 9), f"it hung: {outcome}"
            return outcome

        yield run
        process.stdin.close()


@pytest.fixture(scope="session")
def crashes(
    source: Path,
    driver: Callable[[dict[str, Any]], Outcome],
    tmp_path_factory: pytest.TempPathFactory,
) -> Crashes:
    """The source and its reference, made once."""
    return Crashes(source, tmp_path_factory.mktemp("crashes"), driver)


class Disk:
    """A small filesystem whose size can be changed."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def resize(self, size: int) -> None:
        """To so many bytes, rounded up to pages."""
        command = ["mount", "-o", f"remount,size={size}", str(self.place)]
        subprocess.run(command, check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A tmpfs of 64 MiB; a file that is still open at the end is an error."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield Disk(place)
    if subprocess.run(["umount", str(place)], check=False).returncode:
        subprocess.run(["umount", "-l", str(place)], check=True)
        pytest.fail("a file on the small disk was left open")
