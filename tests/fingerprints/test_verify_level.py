"""``verify --level forward``: the judge among the other judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsv4_quant.cli.main import app
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.record import Recording
from dsv4_quant.validators.verify import verify
from tests.folders import copy_of, golden


@pytest.fixture(scope="module")
def file(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fingerprint") / "F.json"
    path.write_bytes(to_json(recording.fingerprint))
    return path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, args)])


def test_a_converted_checkpoint_holds(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(golden("tiny-fp4"), out, Request("mp", 2, "fp8"), workers=2)
    report = verify(out, "forward", fingerprint=file, against=golden("tiny-fp4"), workers=2)
    assert report.findings == () and report.level == "forward"
    assert [check.level for check in report.checks] == [
        "structure", "checksums", "values", "against", "forward",
    ]  # fmt: skip
    assert report.checks[-1].tensors == report.checks[0].tensors, "the prompts use every weight"
    assert str(report.forward).startswith("gate bit") and report.digest is not None
    assert report.reading is not None
    assert report.checks[-1].bytes == report.reading.bytes_read == report.reading.bytes_needed


def test_the_command(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = run(golden("tiny-fp4"), "--fingerprint", file, "--json", out)
    assert done.exit_code == 0, done.output
    assert "forward: gate bit (recorded on the same class of machine)" in done.stdout
    said = json.loads(out.read_bytes())
    assert said["level"] == "forward" and said["forward"].startswith("gate bit")
    assert said["reading"]["bytes_read"] == said["reading"]["bytes_needed"]
    assert "s waiting for the disk, which" in " ".join(done.stdout.split())


def test_a_changed_weight_ends_with_1(file: Path, tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "damaged")
    index = json.loads((root / "model.safetensors.index.json").read_bytes())
    name = "layers.3.ffn.experts.2.w2.weight"
    shard = root / index["weight_map"][name]
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin = start + json.loads(raw[8:start])[name]["data_offsets"][0]
    raw[begin + 100] ^= 0x10
    shard.write_bytes(raw)
    done = run(root, "--fingerprint", file)
    assert done.exit_code == 1
    told = " ".join(done.stdout.split())
    assert "gate bit does not hold" in told and "after layer 3 ffn" in told
    assert "Look at layers.3.ffn.experts.2.w1.weight, layers.3.ffn.experts.2.w2.weight" in told
    lossy = run(root, "--fingerprint", file, "--gate", "lossy")
    assert lossy.exit_code == 0 and "gate lossy (it was asked for)" in " ".join(
        lossy.stdout.split()
    )


def test_nothing_is_run_where_weights_are_missing(file: Path, tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "missing")
    (root / "model-00002-of-00003.safetensors").unlink()
    report = verify(root, "forward", fingerprint=file, workers=2)
    assert report.forward == "the forward pass was not run" and report.reading is None
    assert any(one.check == "fingerprint" for one in report.findings)
    assert any(one.check in ("files", "index", "tensors") for one in report.findings)


def test_what_does_not_go_together(file: Path) -> None:
    with pytest.raises(UsageError, match="none was given"):
        verify(golden("tiny-fp4"), "forward")
    with pytest.raises(UsageError, match="runs no forward pass"):
        verify(golden("tiny-fp4"), "values", fingerprint=file)
    assert run(golden("tiny-fp4"), "--gate", "bit").exit_code == 2
    assert run(golden("tiny-fp4"), "--fingerprint", file, "--level", "values").exit_code == 2
    assert run(golden("tiny-fp4"), "--fingerprint", file.with_name("none")).exit_code == 2
