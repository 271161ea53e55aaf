"""action.yml: its scripts are run here as GitHub would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.folders import copy_of, golden

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
INSTALL, VERIFY = ACTION["runs"]["steps"][1:]


def bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A step's script, with the environment that its expressions would fill."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": path, **env},
    )  # fmt: skip


def verify(checkpoint: Path | str, **inputs: str) -> subprocess.CompletedProcess[str]:
    defaults = {"LEVEL": "values", "AGAINST": "", "JUNIT": "", "GITHUB_ACTIONS": "true"}
    return bash(VERIFY["run"], CHECKPOINT=str(checkpoint), **{**defaults, **inputs})


def test_inputs_reach_the_scripts_as_variables_only() -> None:
    assert "${{" not in VERIFY["run"] + INSTALL["run"]
    wanted = {"path", "level", "against", "junit", "python-version"}
    assert set(ACTION["inputs"]) == wanted
    text = str(ACTION["runs"])
    assert all(f"inputs.{name} " in text for name in wanted)


def test_a_sound_checkpoint_passes(tmp_path: Path) -> None:
    source = str(golden("tiny-fp4"))
    done = verify(source, AGAINST=source, JUNIT=str(tmp_path / "report.xml"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.xml").read_bytes().startswith(b"<?xml")


def test_a_damaged_one_fails_with_annotations(tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "-a checkpoint; $(touch x)")
    (root / "model.safetensors.index.json").unlink()
    done = verify(root, LEVEL="structure")
    assert done.returncode == 1
    assert "::error file=" in done.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize("level", ["everything", ""])
def test_a_wrong_level_is_wrong_usage(level: str) -> None:
    assert verify(golden("tiny-fp4"), LEVEL=level).returncode == 2


def test_it_installs_all_dependencies_but_the_large_ones(tmp_path: Path) -> None:
    script = INSTALL["run"].split("python -m pip")[0]
    done = bash(script, ACTION=str(ROOT), TEMPORARY=str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = {line.split(">")[0] for line in (tmp_path / "dsv4-quant.txt").read_text().split("\n")}
    assert {"numpy", "numba", "blake3", "typer", "huggingface-hub"} <= names
    assert not names & {"torch", "triton"}
