"""Compiling costs nothing at import, and survives whatever lies in the cache folder."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

KERNELS = sorted(p.stem for p in (Path(__file__).parents[2] / "kernels").glob("*_numba.py"))

TOY = """
from dsv4_quant.kernels.jit_numba import kernel

@kernel
def double(x):
    return 2 * x
"""

IMPORT_ALL = """
import importlib, sys
from numba.core import event

class Alarm(event.Listener):
    def on_start(self, happening):
        raise SystemExit(f"compiles at import: {happening.data['dispatcher']}")
    def on_end(self, happening):
        pass

event.register("numba:compile", Alarm())
for name in sys.argv[1:]:
    importlib.import_module("dsv4_quant.kernels." + name)
assert "torch" not in sys.modules, "imports torch"
print("quiet")
"""


def test_importing_compiles_nothing_and_needs_no_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *KERNELS], capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("quiet\n", "")
    assert len(KERNELS) >= 7


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Callable[[int], int]]:
    """Import the toy kernel afresh; it can keep its cache in ``tmp_path/__pycache__`` only."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    def load() -> Callable[[int], int]:
        spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        double: Callable[[int], int] = module.double
        return double

    return load


def test_the_cache_is_used(toy: Callable[[], Callable[[int], int]], tmp_path: Path) -> None:
    assert toy()(4) == 8
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "__pycache__").glob("toy.double*.nb?")}
    assert len(kept) == 2
    assert toy()(4) == 8
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in kept.items())


def test_no_folder_to_keep_a_cache_in(
    toy: Callable[[], Callable[[int], int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "__pycache__").touch()
    assert toy()(4) == 8


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, 40])
def test_a_torn_cache_file(
    toy: Callable[[], Callable[[int], int]], tmp_path: Path, kind: str, left: int
) -> None:
    """As a power failure leaves it."""
    assert toy()(4) == 8
    [file] = (tmp_path / "__pycache__").glob(f"toy.double*.{kind}")
    file.write_bytes(file.read_bytes()[:left])
    double = toy()
    assert double(4) == double(4) == 8


def test_the_cache_folder_vanishes_before_the_first_call(
    toy: Callable[[], Callable[[int], int]], tmp_path: Path
) -> None:
    double = toy()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    (tmp_path / "__pycache__").touch()
    assert double(4) == 8
