"""``dsv4-quant synth``."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from dsv4_quant.cli.main import app
from dsv4_quant.synthesis import synth
from tests.folders import golden


def test_every_option_reaches_the_library(tmp_path: Path) -> None:
    config = golden("tiny-fp4") / "config.json"
    options = ["--config", str(config), "--experts", "fp8", "--layers", "3"]
    options += ["--seed", "-7", "--shards", "2", "--json", "-"]
    done = CliRunner().invoke(app, ["synth", str(tmp_path / "cli"), *options])
    assert done.exit_code == 0, done.stderr
    report = synth(tmp_path / "library", config=config, experts="fp8", layers=3, seed=-7, shards=2)
    assert json.loads(done.stdout)["bytes"] == report.bytes
    for path in sorted((tmp_path / "library").iterdir()):
        assert (tmp_path / "cli" / path.name).read_bytes() == path.read_bytes()


def test_report_and_progress_are_apart(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["synth", str(tmp_path / "out")])
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 504 tensors, 8.87 MiB in 8 shards")
    assert done.stderr.splitlines()[0] == "synthesising ..."


def test_quiet(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["synth", str(tmp_path / "out"), "--quiet", "--layers", "1"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_refusal_is_2_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = CliRunner().invoke(app, ["synth", str(tmp_path)])
    assert done.exit_code == 2
    assert "Name another one" in " ".join(done.stderr.split())
