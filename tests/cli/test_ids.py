"""Commands that take an id, in processes of their own: huggingface-hub reads its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conversion.checkpoints import tree
from tests.folders import golden
from tests.hub_server import COMMIT, Hub, Refuse, serving


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(golden("tiny-fp4")) as hub:
        yield hub


def command(hub: Hub, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "dsv4_quant", *args],
        capture_output=True, text=True, timeout=120,
        env={**env, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "TMPDIR": str(home)},
    )  # fmt: skip


def test_from_headers_alone(hub: Hub, tmp_path: Path) -> None:
    inspected = command(hub, tmp_path, "inspect", f"someone/tiny@{COMMIT}", "--json", "-")
    found = json.loads(inspected.stdout)
    assert found["path"] == f"someone/tiny@{COMMIT}" and found["files"] == 3

    verified = command(
        hub, tmp_path, "verify", "someone/tiny", "--level", "structure", "--json", "-"
    )
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["path"] == "someone/tiny"

    out = tmp_path / "out"
    planned = command(
        hub, tmp_path, "convert", "someone/tiny", str(out), "--gpus", "2", "--dry-run",
        "--json", "-", "--quiet",
    )  # fmt: skip
    local = command(
        hub, tmp_path, "convert", str(golden("tiny-fp4")), str(out), "--gpus", "2", "--dry-run",
        "--json", "-", "--quiet",
    )  # fmt: skip
    there, here = json.loads(planned.stdout), json.loads(local.stdout)
    assert there.pop("disk_needed") > here.pop("disk_needed")  # by what arrives
    for one in (there, here):
        one.pop("disk_free")
    assert there == here and not out.exists()
    shards = [name for name in hub.sent if name.endswith(".safetensors")]
    assert len(shards) == 3 and max(hub.sent[name] for name in shards) <= 3 * (256 << 10)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("dsv4-quant-")]


def test_convert(hub: Hub, tmp_path: Path) -> None:
    args = ("--layout", "hf", "--experts", "fp8")
    done = command(hub, tmp_path, "convert", "someone/tiny", str(tmp_path / "out"), *args)
    assert done.returncode == 0, done.stderr
    command(hub, tmp_path, "convert", str(golden("tiny-fp4")), str(tmp_path / "local"), *args)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_what_goes_wrong_is_one_paragraph(hub: Hub, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    moved = command(hub, tmp_path, "convert", "someone/tiny", out, "--gpus", "2", "--move")
    assert moved.returncode == 2 and "--move" in moved.stderr
    hub.trouble = lambda name, start, stop: Refuse(404)
    gone = command(hub, tmp_path, "convert", "someone/tiny", out, "--gpus", "2")
    assert gone.returncode == 2 and "Run the same command again" in " ".join(gone.stderr.split())
    for done in (moved, gone):
        assert "Traceback" not in done.stderr and not Path(out).exists()
