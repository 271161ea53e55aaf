"""The demo runs the whole loop and proves each step."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_quant.cli.main import app

STEPS = ("inspect", "--experts fp8", "repack", "--against source", "digest", "--fingerprint")


def test_the_whole_loop(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "out"), "--json", str(tmp_path / "j")])
    assert result.exit_code == 0, result.output
    assert all(step in result.output for step in STEPS)
    assert "All of it held" in result.output
    facts = json.loads((tmp_path / "j").read_text())
    assert len(set(facts["digests"].values())) == 1 and len(facts["digests"]) == 3
    assert facts["fingerprint"]["said"].startswith("gate bit")
    assert facts["damage"]["findings"] >= 3
    assert "layers.0.ffn.experts.3.w1.weight" in result.output.split("Flip one bit")[1]


def test_quiet_says_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = CliRunner().invoke(app, ["demo", "--quiet"])
    assert (result.exit_code, result.output) == (0, "")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    result = CliRunner().invoke(app, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert (tmp_path / "mine").read_text() == "mine"
