"""What travels, and what is not read."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_quant.conversion.files import OutputFile
from dsv4_quant.conversion.journal import Workspace
from dsv4_quant.errors import ManifestError
from dsv4_quant.formats.blocks import FP4
from dsv4_quant.team.board import pack, put, take, unpack
from dsv4_quant.validators.report import error
from tests.team.boards import MemoryBoard


@pytest.mark.parametrize(
    "value",
    [None, {"a": [1, 2.5, "x", b"y"]}, (Counter({3: 4}), {1, 2}), FP4,
     error("bytes", "missing", "Copy it again.", file="x")],
    ids=repr,
)  # fmt: skip
def test_values(value: object) -> None:
    assert unpack(pack(value)) == value


def test_arrays_and_numbers() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for held in (array, array[:, ::2], np.asfortranarray(array), np.zeros((0, 2), np.int64)):
        found = unpack(pack(held))
        assert found.dtype == held.dtype and found.shape == held.shape and (found == held).all()
    assert unpack(pack(np.float32(2.5))) == 2.5


def test_errors_keep_all_they_say() -> None:
    found = unpack(pack(ManifestError("It lies", file=Path("m"), tensor="t", hint="Fetch it.")))
    assert type(found) is ManifestError and str(found) == "It lies. (file m, tensor t) Fetch it."
    assert (found.what, found.file, found.tensor, found.hint) == ("It lies", "m", "t", "Fetch it.")


class Bomb:
    def __init__(self, call: object, *args: object) -> None:
        self.call = call, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "bomb",
    [Bomb(os.system, "true"), Bomb(eval, "1"), Bomb(print, "x"), Bomb(Path, "x"),
     Bomb(pack, 1), Bomb(getattr, "x", "upper"), Bomb(np.save, "x", 1)],
    ids=lambda bomb: bomb.call[0].__qualname__,
)  # fmt: skip
def test_no_code_is_run(bomb: Bomb) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no plain value"):
        unpack(pickle.dumps(bomb))


def test_names_behind_names_are_not_followed() -> None:
    data = b"\x80\x04\x8c\x1cdsv4_quant.checkpoint.folder\x8c\tos.system\x93\x8c\x04true\x85R."
    with pytest.raises(pickle.UnpicklingError, match="no plain value"):
        unpack(data)


def test_of_any_size() -> None:
    board = MemoryBoard()
    for size in (0, 1, 4 << 20, (8 << 20) + 1):
        value = os.urandom(size)
        put(board, "x", value)
        assert take(board, "x") == value == take(board, "x", forget=True)
        assert not board.held


def test_nothing_that_acts_when_it_is_made(tmp_path: Path) -> None:
    """Reading a value must not open, cut or lock a file."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")

    class Cuts:
        def __reduce__(self) -> Any:
            return OutputFile, (victim, 0, ())

    class Makes:
        def __reduce__(self) -> Any:
            return Workspace, (tmp_path / "made",)

    for bomb in (Cuts(), Makes()):
        with pytest.raises(pickle.UnpicklingError, match="no plain value"):
            unpack(pickle.dumps(bomb))
    assert victim.read_bytes() == b"precious" and not (tmp_path / "made").exists()
