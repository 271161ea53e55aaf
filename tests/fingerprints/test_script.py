"""Where a pass is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_quant.config import read_config
from dsv4_quant.errors import UsageError
from dsv4_quant.fingerprints.prompts import LONGEST, prompt_lengths
from dsv4_quant.fingerprints.script import MAX_PROMPTS, ROWS, SPOTS, evenly, make_script

FLASH = read_config(Path(__file__).parents[1] / "configs" / "V4-Flash.json")


def test_both_sides_of_every_boundary_are_looked_at() -> None:
    script = make_script(FLASH, [[1] * length for length in prompt_lengths(FLASH)])
    longest = script.spots[-1]
    first_choice = 4 * (FLASH.index_topk + 1) - 1  # 513 entries are finished, 512 are kept
    for edge in (3, 127, FLASH.sliding_window, 7, 255, first_choice):
        assert {edge - 1, edge} <= set(longest)
    assert {0, 2303} <= set(longest)
    assert [prompt[-1] for prompt in script.spots] == [0, 4, 128, 2303]
    assert script.mtp


lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=MAX_PROMPTS)


@given(lengths)
def test_places_are_positions_in_order_and_few(sizes: list[int]) -> None:
    script = make_script(FLASH, [[0] * size for size in sizes])
    for places, budget in ((script.spots, SPOTS), (script.rows, ROWS)):
        assert sum(map(len, places)) <= budget
        for size, prompt in zip(sizes, places, strict=True):
            assert list(prompt) == sorted(set(prompt)) and prompt and prompt[-1] < size
    assert sum(map(len, script.rows)) >= min(sum(sizes), ROWS - len(sizes) * 2)


@given(st.integers(1, 500), st.integers(0, 500))
def test_evenly(length: int, count: int) -> None:
    found = list(evenly(length, count))
    assert len(found) == min(length, count) and found == sorted(set(found))
    assert all(0 <= position < length for position in found)
    if count > 1:
        assert found[0] == 0 and found[-1] == length - 1


@pytest.mark.parametrize("prompts", [[], [[0]] * 9, [[0], []], [[0] * (LONGEST + 1)]])
def test_too_much_or_nothing_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError):
        make_script(FLASH, prompts)


def test_a_drafter_is_no_mtp_block() -> None:
    later = read_config(Path(__file__).parents[1] / "configs" / "V4-Flash-0731.json")
    assert not make_script(later, [[0]]).mtp
