"""``convert --lossy``, with its report, a fingerprint and a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_convert import plain, run
from tests.folders import golden

BASE = golden("tiny-base")
LOSSY = ("--layout", "hf", "--experts", "fp4", "--lossy")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.json").write_text(json.dumps([[5, 9, 2, 300, 41] * 4, [7, 7, 8]]))
    done = run("fingerprint", BASE, "--output", folder / "base.json", "--prompts",
               folder / "prompts.json", "--quiet")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_what_it_cost_is_told_and_shown(recorded: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("convert", BASE, tmp_path / "out", *LOSSY, "--report", page,
               "--fingerprint", recorded / "base.json", "--json", tmp_path / "j.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = plain(done.stdout)
    assert "requantised 144 weights fp8 128x128 f32 → fp4 1x32 e8m0, SQNR 18." in said
    assert "worst 10 of 144" in said
    found = json.loads((tmp_path / "j.json").read_text())["requantised"]
    manifest = json.loads((tmp_path / "out" / "dsv4-manifest.json").read_text())["requantised"]
    assert found["rule"] == manifest["rule"] == "least-squares"
    assert found["error_squares"] == manifest["model"]["error_squares"] > 0
    text = page.read_text()
    assert "SQNR" in text and "KL" in text and "lossy" in text
    again = run("convert", BASE, tmp_path / "out", *LOSSY, "--report", tmp_path / "again.html",
                "--fingerprint", recorded / "base.json")  # fmt: skip
    assert again.exit_code == 0 and "requantised 144 weights" in plain(again.stdout)
    assert "answers gate lossy" in plain(again.stdout)
    told = json.loads((tmp_path / "j.json").read_text())["closeness"]
    assert told["gate"] == "lossy" and told["kl"] > 0


def test_the_published_rule_is_worse(tmp_path: Path) -> None:
    errors = {}
    for rule in ("max", "least-squares"):
        out = tmp_path / rule
        run("convert", BASE, out, *LOSSY, "--scale-rule", rule, "--json", tmp_path / "j", "--quiet")
        errors[rule] = json.loads((tmp_path / "j").read_text())["requantised"]["error_squares"]
    assert errors["least-squares"] < 0.97 * errors["max"]


def test_calibrated(recorded: Path, tmp_path: Path) -> None:
    done = run("convert", BASE, tmp_path / "out", *LOSSY, "--calibrate", recorded / "prompts.json",
               "--report", tmp_path / "page.html")  # fmt: skip
    assert done.exit_code == 0, done.output
    held = json.loads((tmp_path / "out" / "dsv4-manifest.json").read_text())["requantised"]
    assert held["calibration"]["tokens"] == 23 and held["calibration"]["experts"] == 48
    assert held["calibration"]["weights_moved"] == 0  # so few tokens are not believed
    assert "calibrated 0 of 144 weights" in plain(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "page.html"}
    assert run("verify", tmp_path / "out", "--quiet").exit_code == 0


def test_a_dry_run_says_what_will_be_rounded(tmp_path: Path) -> None:
    done = run("convert", BASE, tmp_path / "out", *LOSSY, "--dry-run")
    assert "fp8_to_fp4 144 rounded where it must be" in plain(done.stdout)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(recorded: Path, tmp_path: Path) -> None:
    prompts, out, hf = recorded / "prompts.json", tmp_path / "out", ("--layout", "hf")
    for arguments, words in [
        ([*hf, "--report", tmp_path / "p.html"], "without --lossy nothing is rounded"),
        ([*LOSSY, "--fingerprint", recorded / "base.json"], "no page was asked for"),
        ([*hf, "--calibrate", prompts], "without --lossy nothing is rounded"),
        ([*hf, "--lossy", "--calibrate", prompts], "say --experts fp4 or --experts fp8"),
        ([*LOSSY, "--calibrate", prompts, "--move"], "--calibrate and --move"),
        ([*LOSSY, "--report", tmp_path / "no" / "p.html"], "cannot be written"),
        ([*LOSSY, "--calibrate", recorded / "base.json"], "These are no prompts"),
        ([*LOSSY, "--report", BASE / "config.json"], "into a checkpoint's folder"),
        ([*LOSSY, "--report", prompts], "replace a file that is no page"),
        ([*LOSSY, "--report", tmp_path / "a", "--json", tmp_path / "a"], "name the same file"),
        ([*hf, "--lossy", "--report", tmp_path / "p.html"], "nothing to report"),
        ([*hf, "--scale-rule", "max"], "--scale-rule says how to round"),
        ([*LOSSY, "--calibrate", prompts, "--max-memory", "512MiB"], "too little to calibrate"),
    ]:
        done = run("convert", BASE, out, *arguments)
        assert done.exit_code == 2 and words in plain(done.stderr), done.stderr
        assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_without_lossy_it_is_refused_and_the_way_is_named(tmp_path: Path) -> None:
    done = run("convert", BASE, tmp_path / "out", "--layout", "hf", "--experts", "fp4")
    assert done.exit_code == 1 or done.exit_code == 2
    assert "--lossy rounds and tells what that costs" in plain(done.stderr)


def test_a_fingerprint_of_other_weights_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    run("convert", golden("tiny-fp4"), source, "--layout", "hf", "--quiet")
    run("fingerprint", source, "--output", tmp_path / "other.json", "--quiet")
    done = run("convert", BASE, tmp_path / "out", *LOSSY, "--report", tmp_path / "p.html",
               "--fingerprint", tmp_path / "other.json")  # fmt: skip
    assert done.exit_code == 2 and "of other weights" in plain(done.stderr)
    assert (tmp_path / "out" / "SHA256SUMS").exists() and not (tmp_path / "p.html").exists()


def test_fp4_experts_leave_nothing_to_calibrate(recorded: Path, tmp_path: Path) -> None:
    done = run("convert", golden("tiny-fp4"), tmp_path / "out", "--layout", "hf", "--experts",
               "fp8", "--lossy", "--calibrate", recorded / "prompts.json")  # fmt: skip
    assert done.exit_code == 2 and "nothing to choose" in plain(done.stderr)
