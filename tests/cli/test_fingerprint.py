"""``dsv4-quant fingerprint``: recording and importing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsv4_quant.cli.main import app
from dsv4_quant.fingerprints.parse import read_fingerprint
from tests.folders import golden

SERVED = {
    "format": "dsv4-served",
    "version": 1,
    "source": "a server",
    "prompts": [{"tokens": [0, 6, 7], "spots": [{"position": 2, "top": [[9, -0.5], [3, -1.5]]}]}],
}


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["fingerprint", *map(str, args)])


def test_what_is_recorded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    out, facts = tmp_path / "F.json", tmp_path / "facts.json"
    result = run(golden("tiny-fp4"), "--output", out, "--json", facts, "--digest")
    assert result.exit_code == 0, result.output
    made = read_fingerprint(out)
    assert made.measured is not None
    whole = re.sub(r"\n {10}", " ", result.stdout)
    told = {line.split()[0]: line for line in whole.splitlines()}
    assert told["file"] == f"file      {out}, {out.stat().st_size:,} bytes"
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    assert "5 prompts, 410 tokens" in told["run"]
    assert "8 of 8 in each of 1 hash layers; 8 of 8 in each of 5 scored layers" in told["experts"]
    assert "64 entries of 4 tokens" in told["reached"] and "indexer keeps 8" in told["reached"]
    assert told["missed"] == "missed    nothing"
    assert str(made.measured.value_digest) in told["digest"]
    said = json.loads(facts.read_text())
    assert said["coverage"]["experts_hit"] == [8] * 6
    assert said["bytes"] == out.stat().st_size and said["kind"] == "forward"
    assert said["reading"]["bytes_read"] == said["reading"]["bytes_needed"] > 1_000_000
    assert "s waiting for the disk" in told["reading"]
    assert "forward pass: 7 steps in" in result.stderr


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    tokens, out = tmp_path / "T.json", tmp_path / "F.json"
    tokens.write_text("[[0, 5, 17], [3]]")
    result = run(
        golden("tiny-fp4"), "--output", out, "--prompts", tokens,
        "--arithmetic", "deployed", "--activations", "bfloat16", "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = read_fingerprint(out)
    assert made.script.prompts == ((0, 5, 17), (3,))
    assert (made.script.arithmetic, made.script.activations) == ("deployed", "bfloat16")
    assert made.measured is not None and made.measured.value_digest is None
    for missing in ("sliding window (16)", "window of 4 tokens", "experts: "):
        assert missing in " ".join(result.stdout.split())
    lines = [line for line in result.stdout.splitlines() if str(out) not in line]
    assert max(map(len, lines)) <= 80


def test_import_needs_no_checkpoint(tmp_path: Path) -> None:
    log, out = tmp_path / "log.json", tmp_path / "F.json"
    log.write_text(json.dumps(SERVED))
    result = run("--import", log, "--output", out, "--json", "-")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["kind"] == "served" and said["reading"] is None
    made = read_fingerprint(out)
    assert made.measured is None and made.source == "a server"
    assert "only the lossy gate" in run("--import", log, "--output", out).stdout


def test_the_form_in_the_help_can_be_imported(tmp_path: Path) -> None:
    text = run("--help").stdout
    log, out = tmp_path / "log.json", tmp_path / "F.json"
    log.write_text(text[text.index("{") : text.rindex("}") + 1])
    assert run("--import", log, "--output", out).exit_code == 0
    assert [spot.ids for spot in read_fingerprint(out).spots[0]] == [(16, 270), (1437,)]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--output", "F.json"], "either a checkpoint's PATH or --import"),
        ([golden("tiny-fp4"), "--import", "log.json", "--output", "F.json"], "either"),
        (["--import", "log.json", "--digest", "--output", "F.json"], "--prompts and --digest"),
        (["--import", "none.json", "--output", "F.json"], "No such file"),
        ([golden("tiny-fp4"), "--prompts", "nine.json", "--output", "F.json"], "1 to 8 prompts"),
        ([golden("tiny-fp4"), "--output", "no/F.json"], "cannot be written"),
        ([golden("tiny-fp4")], "--output"),
    ],
)
def test_wrong_usage_ends_with_2(
    args: list[str | Path], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.json").write_text(json.dumps(SERVED))
    Path("nine.json").write_text("[[0],[0],[0],[0],[0],[0],[0],[0],[0]]")
    result = run(*args)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())
    assert not Path("F.json").exists()
