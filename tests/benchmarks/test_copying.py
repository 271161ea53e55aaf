"""The yardstick copies what it is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import copying


def test_every_byte_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PANEL", 1 << 12)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, size in (("empty", 0), ("page", 1 << 12), ("ragged", 50_001)):
        (source / name).write_bytes(os.urandom(size))
    copying.copy(source, target)
    for path in source.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert len(list(target.iterdir())) == 3
