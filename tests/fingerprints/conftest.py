"""The golden checkpoint and what it says, once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.fingerprints.prompts import choose_prompts
from dsv4_quant.fingerprints.record import Recording, record
from dsv4_quant.fingerprints.script import make_script
from tests.folders import golden


@pytest.fixture(scope="session")
def ckpt() -> Iterator[Checkpoint]:
    with Checkpoint.open(golden("tiny-fp4")) as opened:
        yield opened


@pytest.fixture(scope="session")
def recording(ckpt: Checkpoint) -> Recording:
    """Of the prompts that are chosen by default."""
    return record(ckpt, make_script(ckpt.config, choose_prompts(ckpt)))
