"""``dsv4-quant inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_quant.cli.main import app
from tests.folders import golden

TINY = str(golden("tiny-fp4"))


def test_report_for_people() -> None:
    done = CliRunner().invoke(app, ["inspect", TINY, "--gpus", "2"])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["layout", "hf,", "3", "files"] in lines
    assert ["tensors", "504"] in lines
    assert ["bytes", "9,295,996", "(8.87", "MiB)"] in lines
    assert ["experts", "I8", "120", "1.88", "MiB"] in lines
    assert ["fp4", "(as", "it", "is)", "354", "6,858,676", "6.54", "MiB"] in lines


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_it_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = CliRunner().invoke(app, ["inspect", TINY, "--gpus", "4"])
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


def test_json_is_alone_on_stdout() -> None:
    done = CliRunner().invoke(app, ["inspect", TINY, "--gpus", "4", "--json", "-"])
    found = json.loads(done.stdout)
    assert (found["tensors"], found["bytes"]) == (504, 9_295_996)
    assert found["split"]["gpus"] == 4
    assert [one["experts"] for one in found["split"]["per_gpu"]] == ["fp4", "fp8", "bf16"]
    assert sum(part["bytes"] for part in found["parts"]) == found["bytes"]


def test_json_to_a_file_beside_the_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", TINY, "--json", str(tmp_path / "i.json")])
    assert "504" in done.stdout
    assert json.loads((tmp_path / "i.json").read_bytes())["split"] is None


def test_quiet_prints_nothing() -> None:
    done = CliRunner().invoke(app, ["inspect", TINY, "--quiet"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_impossible_gpu_count_is_2() -> None:
    done = CliRunner().invoke(app, ["inspect", TINY, "--gpus", "3"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Possible GPU counts: 1, 2, 4." in " ".join(done.stderr.split())
