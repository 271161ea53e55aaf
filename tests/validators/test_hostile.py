"""Whatever a stranger puts into the folder, ``verify`` ends in a report or a named error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS
from dsv4_quant.errors import Dsv4Error
from dsv4_quant.validators.verify import verify
from tests.folders import INDEX
from tests.validators.conftest import Sound
from tests.validators.damages import SHARDS

TEXTS = ["config.json", "inference/config.json", INDEX, MANIFEST, SUMS]


@pytest.fixture(scope="module")
def victim(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pinned checkpoint whose small files the examples overwrite, one at a time."""
    root = tmp_path_factory.mktemp("hostile") / "c"
    return Path(shutil.copytree(sound("fp4"), root))


def ends_well(root: Path, name: str, content: bytes) -> None:
    """Verifies with other content in one file, and puts the old one back."""
    path = root / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        report = verify(root, "checksums", workers=1)
        assert not report.holds
        json.dumps(report.to_json())
    except Dsv4Error as refused:
        assert len(refused.paragraph()) < 2000
    finally:
        path.write_bytes(before)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TEXTS), st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40))
def test_mutated_text(victim: Path, name: str, at: float, removed: int, added: bytes) -> None:
    raw = (victim / name).read_bytes()
    start = int(at * len(raw))
    mutated = raw[:start] + added + raw[start + removed :]
    if mutated != raw:
        ends_well(victim, name, mutated)


JUNK: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, 1e308, "", "x" * 5000, "../../etc/passwd", "\ud800", "a\x00b",
    [], [[]], {}, {"": {}}, [1] * 5000, {"weight_map": {"a": "/etc/passwd"}},
]  # fmt: skip


@pytest.mark.parametrize("name", [*TEXTS, SHARDS[1]])
@pytest.mark.parametrize("junk", JUNK, ids=lambda value: repr(value)[:20])
def test_junk_instead_of_a_file(victim: Path, name: str, junk: Any) -> None:
    ends_well(victim, name, json.dumps(junk).encode())


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """A few keys of every level of an object."""
    if not isinstance(value, dict):
        return []
    found = [(*path, key) for key in value]
    return [p for own in found for p in (own, *places(value[own[-1]], own)[:3])]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_junk_instead_of_a_value(victim: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(TEXTS[:4]))
    value = json.loads((victim / name).read_bytes())
    path = data.draw(st.sampled_from(places(value)))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    junk = data.draw(st.sampled_from(JUNK))
    if type(inner[path[-1]]) is not type(junk) or inner[path[-1]] != junk:
        inner[path[-1]] = junk
        ends_well(victim, name, json.dumps(value).encode())


def test_files_that_are_none(victim: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(victim, tmp_path / "c"))
    os.mkfifo(root / "pipe.json")
    (root / "loop").symlink_to("loop")
    (root / "out.json").symlink_to("/etc/hostname")
    (root / "a\nb\x1b[31m.txt").write_text("x")
    (root / "model-00009-of-00003.safetensors").mkdir()
    report = verify(root, workers=1)
    named = {f.file for f in report.findings}
    assert {"pipe.json", "loop", "out.json", "model-00009-of-00003.safetensors"} <= named
    assert any(name and name.startswith("a") and name.isprintable() for name in named)
