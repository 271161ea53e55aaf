"""The terminal's account of a requantising run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dsv4_quant.cli.requantised import describe, worst_table
from dsv4_quant.formats.blocks import BF16
from dsv4_quant.formats.cost import Cost
from dsv4_quant.reports.recast import worst
from tests.reports.synthetic import FP8, catalogue, rows, tiny


@pytest.fixture(autouse=True)
def _eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_longest_names_fit_80_columns() -> None:
    first = rows(catalogue(1, 20), before=BF16, bad=0)[:20]
    longest = [
        replace(row, spec=row.spec._replace(name=f"layers.60.ffn.experts.{380 + i}.w2.weight"))
        for i, row in enumerate(first)
    ]
    text = worst_table(longest, 10)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert all(row.name in text for row in worst(longest, 10))


def test_the_worst_come_first_and_with_their_figures() -> None:
    row = replace(
        tiny()[0], cost=Cost(1000, 100.0, 1.0, 0.0625, 12, 83_521, 40, 20)
    )  # 20 dB: a tenth
    assert worst_table([row], 10).splitlines()[1].split() == [
        row.name, "20.00", "10.0%", "0.062", "12", "83.5k", "50%",
    ]  # fmt: skip


def test_the_account_names_casts_and_weights_apart() -> None:
    text = " ".join(describe(tiny()).split())
    assert "168 weights fp8 128x128 e8m0 → fp4 1x32 e8m0, SQNR 18.39 dB" in text
    assert "60 weights bf16 → fp8 128x128 e8m0, SQNR 31.43 dB" in text
    assert "2 of 228 weights, each more than 3 dB below" in text
    assert max(map(len, describe(tiny()).splitlines())) <= 80
    assert len(worst_table(tiny(), 10).splitlines()) == 11


def test_nothing_and_exact_are_said() -> None:
    assert describe([]) == "requantised   nothing"
    exact = [
        replace(row, before=FP8, cost=Cost(4, 1.0, blocks=1, exact_blocks=1)) for row in tiny()
    ]
    text = " ".join(describe(exact).split())
    assert "exact, rms error 0%" in text and "saturated none" in text and "100% of the" in text
    assert "none is more than 3 dB below" in text
    assert exact[0].cost.sqnr == math.inf
