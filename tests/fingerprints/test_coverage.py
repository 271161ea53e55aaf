"""What is said of what the prompts exercise."""

from __future__ import annotations

from pathlib import Path

from dsv4_quant.config import read_config
from dsv4_quant.fingerprints.coverage import coverage
from dsv4_quant.fingerprints.prompts import prompt_lengths
from dsv4_quant.fingerprints.script import make_script

CONFIGS = Path(__file__).parents[1] / "configs"
FLASH = read_config(CONFIGS / "V4-Flash.json")
ALL = range(256)


def test_nothing_is_missed() -> None:
    script = make_script(FLASH, [list(range(length)) for length in prompt_lengths(FLASH)])
    found = coverage(FLASH, script, [ALL] * 44)
    assert found.missed == ()
    assert (found.tokens, found.distinct_tokens, found.longest) == (2439, 2304, 2304)
    assert found.windows == {4: 576, 128: 18} and found.index_topk == 512
    assert found.hash_layers == 3 and found.experts_hit == (256,) * 44


def test_whatever_is_missed_is_said() -> None:
    script = make_script(FLASH, [[1, 2, 3]])
    found = coverage(FLASH, script, [[0, 1]] * 5 + [ALL] * 39)
    assert found.missed == (
        "no prompt is longer than the sliding window (128)",
        "no window of 4 tokens is ever finished",
        "no window of 128 tokens is ever finished",
        "there are never more compressed entries than index_topk 512",
        "experts: 254 of 256 in layer 0, 254 of 256 in layer 1, 254 of 256 in layer 2,"
        " 254 of 256 in layer 3 and in 1 more layer",
    )


def test_one_entry_too_few() -> None:
    for length, missed in ((2051, 1), (2052, 0)):
        script = make_script(FLASH, [[1] * length])
        assert len(coverage(FLASH, script, [ALL] * 44).missed) == missed


def test_a_drafter_is_not_run() -> None:
    later = read_config(CONFIGS / "V4-Flash-0731.json")
    script = make_script(later, [[1] * 2304])
    assert "under mtp" in coverage(later, script, [ALL] * 43).missed[0]
