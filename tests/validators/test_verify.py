"""``verify`` as a whole: everything is told, nothing hides anything, nothing is done twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_quant.catalogue import Catalogue, published_formats, shard_count, shard_of
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.header import build_header
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.config import read_config
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import SourceChangedError, UnreadableError, UsageError
from dsv4_quant.validators.quantisation import config_differences
from dsv4_quant.validators.report import Level, Report
from dsv4_quant.validators.verify import judge, verify
from tests.conversion.checkpoints import digests
from tests.folders import INDEX, copy_of, edited_file, edited_json, golden
from tests.validators.conftest import Sound
from tests.validators.damages import IDS, NORM, SHARDS, W1, WO_A, set_bytes

CONFIGS = Path(__file__).parents[1] / "configs"


def told(report: Report, check: str) -> set[str | None]:
    """Tensors or files that a check names."""
    return {f.tensor or f.file for f in report.findings if f.check == check}


def test_every_damage_is_told_and_none_hides_another(tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    set_bytes(WO_A, 300, 0x7F)(root)
    set_bytes(W1.replace("weight", "scale"), 5, 0xFF)(root)
    set_bytes(IDS, 80, 8)(root)
    set_bytes("head.weight", 20, 0xC0, 0x7F)(root)
    with edited_file(root / SHARDS[1]) as tensors:
        del tensors["layers.2.attn_norm.weight"]
    with edited_json(root / INDEX) as index:
        index["metadata"]["total_size"] += 2
    with edited_json(root / "config.json") as config:
        config["expert_dtype"] = "fp8"
    report = verify(root, against=golden("tiny-fp4"), workers=2)
    assert told(report, "config") == {"config.json"}
    assert told(report, "tensors") == {"layers.2.attn_norm.weight"}
    assert told(report, "index") == {"layers.2.attn_norm.weight", INDEX}
    assert told(report, "numbers") == {WO_A, W1.replace("weight", "scale"), "head.weight"}
    assert told(report, "expert ids") == {IDS}
    assert told(report, "against") == {WO_A, W1, "head.weight", IDS}
    assert report.digest is None
    assert [check.skipped for check in report.checks] == [0, 0, 1, 1]


def test_damage_in_one_shard_leaves_the_others_judged(tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    (root / SHARDS[1]).write_bytes((root / SHARDS[1]).read_bytes()[:-1])
    set_bytes("head.weight", 20, 0xC0, 0x7F)(root)
    report = verify(root, workers=2)
    assert told(report, "headers") == {SHARDS[1]}
    assert told(report, "numbers") == {"head.weight"}
    assert told(report, "tensors") == set(), "one truncated file is one finding, not one a tensor"
    judged = report.checks[-1]
    assert judged.tensors + judged.skipped == 308
    assert judged.skipped > 50


def test_without_a_config_the_bytes_are_still_judged(sound: Sound, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound("fp4"), tmp_path / "c"))
    (root / "config.json").write_text("{")
    set_bytes(NORM, 20, -1)(root)
    report = verify(root, workers=2)
    assert told(report, "config") == {"config.json"}
    assert told(report, "bytes") == {"config.json", SHARDS[0]}
    assert report.checks[-1].skipped > 300


@pytest.mark.parametrize("source", ["fp4", "base", "mp"])
def test_any_number_of_threads_says_the_same(source: str, sound: Sound) -> None:
    one, many = (judge(sound(source), workers=workers) for workers in (1, 5))
    assert one.report.findings == many.report.findings == ()
    assert one.digests == many.digests == digests(sound(source))
    assert one.report.digest == model_digest(one.digests)


def test_copies_for_other_ranks_are_read(sound: Sound) -> None:
    hf, mp = (verify(sound(source), workers=2).checks[-1] for source in ("fp4", "mp"))
    assert (hf.files, mp.files) == (3, 2)
    assert hf.tensors == mp.tensors == 308


@pytest.mark.parametrize(
    ("case", "request_"),
    [
        ("tiny-fp4", Request("mp", 2, "fp8")),
        ("tiny-fp4", Request("mp", 4, "keep")),
        ("tiny-fp4", Request("hf", 1, "fp8")),
        ("tiny-fp4", Request("hf", 1, "bf16")),
        ("tiny-fp4", Request("hf", 1, "bf16", "bf16")),
        ("tiny-fp4", Request("hf", 1, "keep", "bf16")),
        ("tiny-base", Request("mp", 2, "keep")),
        ("tiny-base", Request("hf", 1, "bf16", "bf16")),
    ],
    ids=str,
)
def test_nothing_is_found_in_what_convert_writes(
    case: str, request_: Request, tmp_path: Path
) -> None:
    report = convert(golden(case), tmp_path / "out", request_, workers=2)
    judged = verify(tmp_path / "out", against=golden(case), workers=2)
    assert judged.findings == ()
    assert judged.digest == report.manifest.value_digest


@pytest.mark.parametrize("release", ["V4-Flash", "V4-Flash-0731", "V4-Pro-0813"])
def test_both_published_configs_of_a_release_agree(release: str) -> None:
    config, flat = (read_config(CONFIGS / f"{release}{kind}.json") for kind in ("", ".inference"))
    assert list(config_differences(config, flat)) == []


def test_nothing_is_found_in_the_structure_of_a_real_release(tmp_path: Path) -> None:
    """V4-Flash-0731, 72,317 tensors in 167 GB of holes: DSpark's blocks, both configs."""
    config = read_config(CONFIGS / "V4-Flash-0731.json")
    catalogue, count = Catalogue(config, published_formats(config)), shard_count(config)
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(count)]
    weight_map, total = {}, 0
    for tensor in catalogue.stored("hf"):
        number = shard_of(tensor.spec, config)
        shards[number].append((tensor.name, tensor.dtype, tensor.shape))
        weight_map[tensor.name] = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        total += tensor.nbytes
    for number, tensors in enumerate(shards, 1):
        header, entries = build_header(tensors)
        with (tmp_path / f"model-{number:05d}-of-{count:05d}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + max(entry.end for entry in entries.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    shutil.copy(CONFIGS / "V4-Flash-0731.json", tmp_path / "config.json")
    (tmp_path / "inference").mkdir()
    shutil.copy(CONFIGS / "V4-Flash-0731.inference.json", tmp_path / "inference/config.json")
    report = verify(tmp_path, "structure")
    assert report.findings == ()
    assert (report.checks[0].files, total) == (48, 166_878_536_440)


def test_a_file_that_cannot_be_read_is_a_finding(
    sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, plain = sound("fp4"), Checkpoint.read_rows

    def failing(self: Checkpoint, name: str, start: int, stop: int) -> Any:
        if name == WO_A:
            raise SourceChangedError(
                "The file cannot be read any more: Input/output error", file=self.root / SHARDS[0]
            )
        return plain(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_rows", failing)
    report = verify(root, workers=2)
    assert [(f.check, f.file, f.tensor) for f in report.findings] == [("reading", SHARDS[0], WO_A)]
    assert "Input/output error" in report.findings[0].found


def test_a_file_that_cannot_be_hashed_is_a_finding(
    sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, *_: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    root = sound("fp4")
    monkeypatch.setattr("dsv4_quant.validators.work.hash_file", failing)
    report = verify(root, "checksums", workers=2)
    assert {(f.check, f.found) for f in report.findings} == {
        ("bytes", "cannot be read: Input/output error")
    }


@pytest.mark.parametrize("level", ["checksums", "values"])
def test_too_many_open_files_are_no_damage(
    level: Level, sound: Sound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say nothing of the checkpoint: there is no verdict then."""

    def failing(*_: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    root = sound("fp4")
    place = {"checksums": "validators.work.hash_file", "values": "checkpoint.reader.os.open"}
    monkeypatch.setattr(f"dsv4_quant.{place[level]}", failing)
    with pytest.raises(OSError, match="Too many open files"):
        verify(root, level, workers=2)


def test_a_difference_is_told_with_place_and_size(tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    name = "layers.1.ffn.gate.weight"  # BF16 [8, 256]
    set_bytes(name, 2 * (3 * 256 + 17), 0x80, 0x3F)(root)
    set_bytes(name, 2 * (5 * 256 + 2), 0x00, 0x42)(root)
    found = [f for f in verify(root, against=golden("tiny-fp4")).findings if f.check == "against"]
    assert [f.tensor for f in found] == [name]
    with Checkpoint.open(golden("tiny-fp4")) as source:
        values = source.read(name).decode()
    largest = max(abs(1 - values[3, 17]), abs(32 - values[5, 2]))
    assert found[0].found == (
        f"2 of 2,048 values differ, the first at [3, 17]: 1, not {values[3, 17]:.9g};"
        f" by {np.float64(largest):.3g} at most"
    )


def test_swapped_weights_are_told_as_such(sound: Sound, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound("fp4"), tmp_path / "c"))
    other = "layers.1.ffn.experts.6.w1.weight"
    with edited_file(root / SHARDS[0]) as tensors:
        for one in (W1, W1.replace("weight", "scale")):
            two = one.replace("experts.3", "experts.6")
            tensors[one], tensors[two] = tensors[two], tensors[one]
    report = verify(root, against=sound("fp4"), workers=2)
    meanings = {(f.check, f.tensor): f.meaning for f in report.findings}
    for check in ("digests", "against"):
        assert f"under {other}: swapped" in meanings[check, W1]
        assert f"under {W1}: swapped" in meanings[check, other]


def test_the_hubs_hashes_are_checked(tmp_path: Path) -> None:
    """In huggingface-hub's cache a file is a link to a blob that its SHA-256 names."""
    home = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    root, blobs = home / "snapshots/abc", home / "blobs"
    copy_of("tiny-fp4", root)
    blobs.mkdir()
    known = json.loads((golden("tiny-fp4").parent / "expected.json").read_bytes())["checkpoint"]
    for name in SHARDS:
        (root / name).replace(blobs / known[name])
        (root / name).symlink_to(f"../../blobs/{known[name]}")
    report = verify(root, "checksums", workers=2)
    assert [(f.severity, f.check) for f in report.findings] == [("warning", "manifest")]
    assert report.checks[-1].files == 3
    blob = blobs / known[SHARDS[2]]
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    report = verify(root, "checksums", workers=2)
    assert told(report, "published") == {SHARDS[2]}


def test_levels_and_their_requests(sound: Sound) -> None:
    root = sound("fp4")
    assert [c.level for c in verify(root, "structure").checks] == ["structure"]
    assert [c.level for c in verify(root, "checksums").checks] == ["structure", "checksums"]
    with pytest.raises(UsageError, match="reads no values"):
        verify(root, "checksums", against=root)
    with pytest.raises(UsageError, match="No such level"):
        verify(root, "everything")  # type: ignore[arg-type]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, sound: Sound) -> None:
    with pytest.raises(UnreadableError):
        verify(tmp_path / "nothing")
    with pytest.raises(UnreadableError):
        verify(tmp_path)
    with pytest.raises(UnreadableError):
        verify(sound("fp4"), against=tmp_path)


def test_the_judge_never_loads_torch_or_the_converter(sound: Sound) -> None:
    code = (
        "import sys; from dsv4_quant.validators.verify import verify\n"
        f"assert verify({str(sound('fp4'))!r}).holds\n"
        "bad = {m for m in sys.modules if m == 'torch' or m.startswith('dsv4_quant.conversion')}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)


def test_the_forward_level_needs_a_fingerprint(sound: Sound) -> None:
    with pytest.raises(UsageError, match="fingerprint"):
        verify(sound("fp4"), "forward")
