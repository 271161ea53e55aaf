"""``manifest``: pins what holds, all or nothing."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS, read_manifest
from dsv4_quant.checkpoint.sums import LISTS
from dsv4_quant.errors import UsageError, WriteError
from dsv4_quant.validators.pin import make_manifest
from dsv4_quant.validators.verify import verify
from tests.conversion.checkpoints import digests, tree
from tests.folders import copy_of, golden
from tests.validators.damages import NORM, WO_A, lose, set_bytes

B3SUMS = LISTS["blake3"]


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


def b3sums(root: Path) -> bytes:
    """What ``b3sum`` prints of all files but such lists, sorted by name."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    lines = (
        f"{blake3((root / name).read_bytes()).hexdigest()}  {name}\n"
        for name in names
        if name not in LISTS.values()
    )
    return "".join(lines).encode()


def test_blake3_instead(tmp_path: Path) -> None:
    """Another list, another key in the manifest; the same values, and as good a guard."""
    root = copy_of("tiny-fp4", tmp_path / "c")
    first = make_manifest(root, workers=2).manifest
    with pytest.raises(UsageError, match="has one already"):
        make_manifest(root, sums="blake3")
    manifest = make_manifest(root, sums="blake3", overwrite=True, workers=2).manifest
    assert manifest == read_manifest(root / MANIFEST)
    assert first is not None and manifest is not None
    assert manifest.tensors == first.tensors
    assert (root / B3SUMS).read_bytes() == b3sums(root)
    assert not (root / SUMS).exists()
    said = json.loads((root / MANIFEST).read_bytes())["files"]
    assert all(record.keys() == {"bytes", "blake3"} for record in said.values())
    assert verify(root, workers=2).findings == ()
    set_bytes(WO_A, 300, 1)(root)
    (found,) = verify(root, "checksums").findings
    assert found.check == "bytes"
    assert re.fullmatch("blake3 [0-9a-f]{64}", found.found)
    assert re.fullmatch("blake3 [0-9a-f]{64}", found.expected or "")
    make_manifest(root, overwrite=True)
    assert not (root / B3SUMS).exists()


def test_lists_of_two_kinds(tmp_path: Path) -> None:
    """Each is believed; only the manifest's own kind must be there and agree with it."""
    root = copy_of("tiny-fp4", tmp_path / "c")
    make_manifest(root, workers=2)
    (root / B3SUMS).write_bytes(b3sums(root))
    assert verify(root, "checksums").findings == ()
    (root / SUMS).rename(tmp_path / SUMS)
    (found,) = verify(root, "checksums").findings
    assert (found.check, found.file, found.found) == ("manifest", SUMS, "missing")
    (tmp_path / SUMS).rename(root / SUMS)
    (root / B3SUMS).write_bytes(b3sums(root).replace(b"a", b"b"))
    found, *more = verify(root, "checksums").findings
    assert {one.check for one in (found, *more)} == {"bytes"}
    assert B3SUMS in found.meaning
    (root / B3SUMS).write_text("no line")
    (found,) = verify(root, "checksums").findings
    assert found.file == B3SUMS and "b3sum" in found.found


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
