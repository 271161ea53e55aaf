"""``--device`` of the commands that run a forward pass: what they ask for, and what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.cli.main import app
from dsv4_quant.errors import MiscomputedError
from dsv4_quant.kernels import gpu_torch
from dsv4_quant.model import on_device
from dsv4_quant.team import Team
from tests.folders import golden

BASE = golden("tiny-base")
PASS = sys.modules["dsv4_quant.model.forward"]  # the package's name for it is the function


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_torch, "has_gpu", lambda: False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and a fingerprint."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "T.json").write_text("[[5, 9, 300], [7]]")
    done = run("fingerprint", BASE, "--prompts", folder / "T.json", "--output", folder / "F.json")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The device and the place of every pass; the processor computes it."""
    plain: Callable[..., Any] = on_device.products_on
    found: list[tuple[str, int]] = []

    def spy(device: str, threads: int | None, *, local: int, refused: Any) -> Any:
        found.append((device, local))
        return plain("cpu", threads)

    monkeypatch.setattr(PASS, "products_on", spy)
    return found


LOSSY = ("--layout", "hf", "--experts", "fp4", "--lossy")
COMMANDS: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "forward": lambda files, out: [
        "forward", BASE, "--tokens", files / "T.json", "--output", out / "L"],
    "fingerprint": lambda files, out: [
        "fingerprint", BASE, "--prompts", files / "T.json", "--output", out / "F"],
    "verify": lambda files, out: ["verify", BASE, "--fingerprint", files / "F.json"],
    "convert --calibrate": lambda files, out: [
        "convert", BASE, out / "C", *LOSSY, "--calibrate", files / "T.json"],
    "convert --fingerprint": lambda files, out: [
        "convert", BASE, out / "C", *LOSSY, "--report", out / "R.html", "--fingerprint",
        files / "F.json"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_every_pass_is_computed_where_it_was_asked_for(
    command: str,
    device: str | None,
    files: Path,
    tmp_path: Path,
    asked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU is looked for where nothing is said; convert then casts on the processor."""
    if device == "cuda":  # casts, too
        monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: torch.device("cpu"))
    words = ["--device", device] if device else []
    done = run(*COMMANDS[command](files, tmp_path), *words)
    assert done.exit_code == 0, done.output
    assert asked == [(device or "auto", 0)]


def test_of_several_processes_each_takes_a_gpu_of_its_own(
    files: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Team, "local", 3)
    assert run("verify", BASE, "--fingerprint", files / "F.json").exit_code == 0
    assert asked == [("auto", 3)]


def said(files: Path, out: Path, *words: str) -> Result:
    return run(*COMMANDS["forward"](files, out), *words)


def test_without_a_gpu_nothing_is_said(files: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    for words in ((), ("--device", "auto"), ("--device", "cpu")):
        result = said(files, tmp_path, *words, "--json", str(facts))
        assert result.exit_code == 0 and "GPU" not in result.output
        assert result.stdout.endswith("/s while it was asked\n")
        assert json.loads(facts.read_text())["reading"]["device"] == "cpu"
    result = said(files, tmp_path, "--device", "cuda")
    wanted = "No CUDA device can be used here. --device cpu does the same on the processor."
    assert result.exit_code == 2 and wanted in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_that_there_is_no_gpu_is_noticed_before_anything_is_read(
    command: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read"))
    result = run(*COMMANDS[command](files, tmp_path), "--device", "cuda")
    assert result.exit_code == 2 and "No CUDA device can be used here" in result.stderr


@pytest.mark.parametrize("command", ["forward", "fingerprint", "verify", "convert --calibrate"])
def test_a_gpu_that_is_refused(
    command: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(there: object, workers: object) -> None:
        raise MiscomputedError("The device X multiplies otherwise", hint="Report it.")

    monkeypatch.setattr(gpu_torch, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_torch, "find_gpu", lambda local: torch.device("cpu"))
    monkeypatch.setattr(on_device, "check_products", wrong)
    words = COMMANDS[command](files, tmp_path)
    insisting = run(*words, "--device", "cuda")
    assert insisting.exit_code == 2 and "Report it." in insisting.stderr
    result = run(*words)
    assert result.exit_code == 0 and "products" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "GPU" in line]
    assert line == "The processor computes, not the GPU. The device X multiplies otherwise"
    if command == "forward":
        assert not run(*words, "--quiet").stderr


@pytest.mark.parametrize("command", ["forward", "fingerprint", "verify"])
def test_a_gpu_that_is_used(
    command: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or so it is made to seem."""

    def chosen(device: str, workers: Any, local: int, refused: Any) -> Any:
        workers.device = f"NVIDIA X (cuda:{local})"
        return workers

    monkeypatch.setattr(on_device, "_chosen", chosen)
    result = run(*COMMANDS[command](files, tmp_path), "--json", tmp_path / "facts.json")
    assert result.exit_code == 0, result.output
    assert "/s while it was asked; products by NVIDIA X (cuda:0)" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "facts.json").read_text())["reading"]["device"] == (
        "NVIDIA X (cuda:0)"
    )
    if command == "fingerprint":  # bit-equal, so of the same class of machine
        assert (tmp_path / "F").read_bytes() == (files / "F.json").read_bytes()
