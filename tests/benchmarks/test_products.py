"""The benchmark of the forward pass's products runs where no GPU is, on a CPU in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import products
from dsv4_quant.formats.blocks import BF16, FP4
from tests.folders import golden


def test_a_line_for_each_product_and_its_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"one": (FP4, (40, 64)), "two": (BF16, (8, 32))}
    rows = list(products.product_rows(torch.device("cpu"), weights, (1, 40)))
    assert [row[:16].strip() for row in rows] == [
        "one, 1 row", "one, 40 rows", "two, 1 row", "two, 40 rows",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(products.HEAD)}
    monkeypatch.setattr(products, "same_bits", lambda *_: False)
    with pytest.raises(AssertionError, match="one: other bits"):
        list(products.product_rows(torch.device("cpu"), weights, (1,)))


def test_a_line_for_each_device(tmp_path: Path) -> None:
    (row,) = products.pass_rows(golden("tiny-fp4"), tmp_path, 1, ("cpu",))
    assert row.startswith("cpu ") and len(row) == len(products.PASS_HEAD)
