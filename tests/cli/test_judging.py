"""``verify``, ``digest`` and ``manifest`` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner, Result

from dsv4_quant.cli.main import app
from tests.folders import copy_of, golden

W1 = "layers.1.ffn.experts.3.w1.weight"
SHARD = "model-00001-of-00003.safetensors"


def run(*args: object, env: dict[str, str] | None = None) -> Result:
    plain = {"COLUMNS": "80", "GITHUB_ACTIONS": "", **(env or {})}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=plain)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_of("tiny-fp4", tmp_path / "checkpoint")


@pytest.fixture
def damaged(root: Path) -> Path:
    """Pinned; then the lowest bit of the first shard's last byte is flipped."""
    assert run("manifest", root, "--quiet").exit_code == 0
    path = root / SHARD
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return root


def test_a_sound_checkpoint_holds(root: Path) -> None:
    assert run("manifest", root).exit_code == 0
    done = run("verify", root, "--against", golden("tiny-fp4"), "--workers", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("HOLDS: nothing found; level values, 308 weights, ")
    assert re.fullmatch("value digest [0-9a-f]{64}", lines[1])
    assert [line.split()[0] for line in lines[3:8]] == [
        "level", "structure", "checksums", "values", "against",
    ]  # fmt: skip


def test_a_warning_does_not_fail(root: Path) -> None:
    done = run("verify", root)
    assert done.exit_code == 0
    assert done.stdout.startswith("HOLDS: 1 warning; ")
    assert "dsv4-quant manifest" in done.stdout


def test_a_damaged_one_is_told_in_eighty_columns(damaged: Path) -> None:
    done = run("verify", damaged, "--against", golden("tiny-fp4"))
    assert done.exit_code == 1
    assert done.stdout.startswith("DAMAGED: 3 errors; level values")
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    text = " ".join(done.stdout.split())
    for part in ("ERROR bytes", "ERROR digests", "ERROR against", SHARD, "1 of 32,768 values"):
        assert part in text


def test_many_findings_of_a_kind_are_counted(root: Path) -> None:
    (root / "config.json").write_text(
        (root / "config.json").read_text().replace('"hidden_size": 256', '"hidden_size": 512')
    )
    done = run("verify", root, "--level", "structure", "--json", root.parent / "r.json")
    assert done.exit_code == 1
    assert "expected hidden_size 256, found hidden_size 512" in " ".join(done.stdout.split())
    assert len(done.stdout.splitlines()) < 150
    said = json.loads((root.parent / "r.json").read_text())
    assert said["errors"] == len(said["findings"]) > 300
    assert re.search(r"\.\.\. and \d+ more; --json FILE has all", done.stdout)


def test_kinds_of_findings_that_take_turns_are_counted_together(root: Path) -> None:
    """A missing shard misses weights and their scales, one after the other."""
    (root / SHARD).unlink()
    (root / "model.safetensors.index.json").unlink()
    done = run("verify", root, "--level", "structure")
    assert done.exit_code == 1
    heads = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert len(heads) < 8 and len(done.stdout.splitlines()) < 100
    assert len(re.findall(r"ERROR tensors, \d{2,} times", done.stdout)) == 2


def test_json_on_stdout_is_alone(damaged: Path) -> None:
    done = run("verify", damaged, "--level", "checksums", "--json", "-")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert (said["holds"], said["level"]) == (False, "checksums")
    assert [f["file"] for f in said["findings"]] == [SHARD]
    assert re.fullmatch("sha256 [0-9a-f]{64}", said["findings"][0]["expected"])


def test_junit_and_quiet(damaged: Path, tmp_path: Path) -> None:
    done = run("verify", damaged, "--junit", tmp_path / "r.xml", "--quiet")
    assert (done.exit_code, done.output) == (1, "")
    suite = ET.fromstring((tmp_path / "r.xml").read_bytes())[0]
    assert (suite.get("tests"), suite.get("failures")) == ("5", "2")


def test_github_gets_annotations(damaged: Path) -> None:
    done = run("verify", damaged, "--json", "-", env={"GITHUB_ACTIONS": "true"})
    json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.startswith("::")]
    assert len(lines) == 2
    assert lines[0].startswith(f"::error file={damaged}/{SHARD},title=verify%3A bytes::expected")
    assert W1.split(".")[0] in lines[1]
    assert not any(line.startswith("::") for line in run("verify", damaged).stderr.splitlines())


def test_wrong_use_and_unreadable_input(root: Path, tmp_path: Path) -> None:
    for args in (
        ["verify", tmp_path / "nothing"],
        ["verify", tmp_path],
        ["verify", root, "--against", tmp_path],
        ["verify", root, "--level", "structure", "--against", root],
        ["verify", root, "--level", "everything"],
        ["verify", root, "--junit", tmp_path / "no/such/folder.xml"],
        ["digest", tmp_path],
        ["manifest", tmp_path],
    ):
        done = run(*args)
        assert done.exit_code == 2, args
        assert "Traceback" not in done.output


def test_digest_is_one_line(root: Path) -> None:
    done = run("digest", root)
    assert done.exit_code == 0
    assert re.fullmatch("[0-9a-f]{64}\n", done.stdout)
    said = json.loads(run("digest", root, "--json", "-").stdout)
    assert said["value_digest"] == done.stdout.strip()
    lines = run("digest", root, "--tensors").stdout.splitlines()
    assert lines == [f"{digest}  {name}" for name, digest in sorted(said["tensors"].items())]
    assert len(lines) == 308


def test_a_nan_has_no_digest(root: Path) -> None:
    raw = bytearray((root / SHARD).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8:start])["layers.1.attn.wo_a.weight"]["data_offsets"][0]
    raw[start + begin] = 0x7F
    (root / SHARD).write_bytes(raw)
    done = run("digest", root)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "layers.1.attn.wo_a.weight" in done.stderr
    assert run("verify", root).exit_code == 1
    done = run("manifest", root)
    assert done.exit_code == 1
    assert done.stdout.startswith("No manifest was written.\nDAMAGED: 1 error; ")
    names = [{path.name for path in folder.iterdir()} for folder in (root, golden("tiny-fp4"))]
    assert names[0] == names[1]


def test_manifest_is_not_replaced_unasked(root: Path) -> None:
    said = json.loads(run("manifest", root, "--json", "-").stdout)
    assert said["written"] == ["dsv4-manifest.json", "SHA256SUMS"]
    before = (root / "dsv4-manifest.json").read_bytes()
    assert run("manifest", root).exit_code == 2
    done = run("manifest", root, "--overwrite")
    assert done.exit_code == 0
    assert done.stdout.rstrip().endswith("dsv4-manifest.json and SHA256SUMS pin 5 files.")
    assert (root / "dsv4-manifest.json").read_bytes() == before
    said = json.loads(
        run("manifest", root, "--overwrite", "--sums", "blake3", "--json", "-").stdout
    )
    assert said["written"] == ["dsv4-manifest.json", "B3SUMS"]
    assert run("verify", root, "--level", "checksums").exit_code == 0
