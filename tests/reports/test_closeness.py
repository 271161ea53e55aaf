"""What a page is told of a fingerprint comparison."""

from __future__ import annotations

import pytest

from dsv4_quant.fingerprints.compare import Apart, Comparison
from dsv4_quant.fingerprints.gates import LOSSY_KL, LOSSY_TOP1
from dsv4_quant.reports.closeness import Prompt, closeness
from tests.reports.synthetic import comparison


def test_the_prompts_add_up_to_the_whole() -> None:
    found = comparison()
    made = closeness(found, "lossy", "it was asked for")
    assert made.holds and (made.kl, made.top1, made.clear) == (found.kl, found.top1, found.clear)
    assert (made.kl_limit, made.top1_limit) == (LOSSY_KL, LOSSY_TOP1)
    assert sum(prompt.spots for prompt in made.prompts) == len(found.spots)
    assert sum(prompt.clear for prompt in made.prompts) == found.clear
    mean = sum((p.kl or 0) * p.spots for p in made.prompts) / len(found.spots)
    assert mean == pytest.approx(found.kl)


def test_what_is_not_met_is_said() -> None:
    made = closeness(comparison(0.5), "lossy", "")
    assert not made.holds and "mean KL divergence" in made.broken[0]


def test_what_is_not_known_stays_unknown() -> None:
    found = Comparison((Apart(0, 3, True, None, None), Apart(1, 2, None, 0.25, None)), ())
    made = closeness(found, "lossy", "")
    assert made.prompts == (Prompt(1, 1, 1, None, None), Prompt(1, 0, 0, 0.25, 0.25))
