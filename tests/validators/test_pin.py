"""``manifest``: pins what holds, all or nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS, read_manifest
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.validators.pin import make_manifest
from dsv4_quant.validators.verify import verify
from tests.conversion.checkpoints import digests, tree
from tests.folders import copy_of, golden
from tests.validators.damages import NORM, WO_A, lose, set_bytes


@pytest.mark.parametrize("case", ["tiny-fp4", "tiny-base"])
def test_what_is_written_is_true(case: str, tmp_path: Path) -> None:
    root = copy_of(case, tmp_path / "c")
    (root / "tokenizer.json").write_text("{}")
    pinned = make_manifest(root, workers=2)
    manifest = read_manifest(root / MANIFEST)
    assert manifest == pinned.manifest
    assert {name: record.digest for name, record in manifest.tensors.items()} == digests(root)
    files = tree(root)
    assert files.keys() - manifest.files.keys() == {MANIFEST, SUMS}
    assert {n: r.sha256 for n, r in manifest.files.items()}.items() <= files.items()
    expected = json.loads((golden(case).parent / "expected.json").read_bytes())["checkpoint"]
    assert {name: files[name] for name in expected} == expected
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=root, check=True, timeout=60)
    assert verify(root, workers=2).findings == ()


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    make_manifest(root, workers=1)
    before = tree(root)
    make_manifest(root, overwrite=True, workers=4)
    assert tree(root) == before


@pytest.mark.parametrize("name", [MANIFEST, SUMS])
def test_what_is_there_is_not_replaced_unasked(name: str, tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    (root / name).write_text("mine")
    before = tree(root)
    with pytest.raises(UsageError, match="has one already"):
        make_manifest(root)
    assert tree(root) == before
    assert make_manifest(root, overwrite=True).manifest is not None
    assert verify(root).findings == ()


@pytest.mark.parametrize("damage", [set_bytes(WO_A, 300, 0x7F), lose(NORM)], ids=["NaN", "lost"])
def test_nothing_broken_is_pinned(damage: object, tmp_path: Path) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    damage(root)  # type: ignore[operator]
    before = tree(root)
    pinned = make_manifest(root, workers=2)
    assert pinned.manifest is None
    assert not pinned.report.holds
    assert tree(root) == before


def test_a_refused_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_of("tiny-fp4", tmp_path / "c")
    before = tree(root)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(WriteError, match="No space left"):
        make_manifest(root, workers=2)
    assert tree(root) == before
