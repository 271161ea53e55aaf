"""The processes that share a command. Each runs all of it; only the first of them speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv4_quant.errors import UsageError
from dsv4_quant.team import Team, join
from dsv4_quant.team.launch import launched

SHARED = ("convert", "repack", "verify", "digest", "fingerprint")
"""Commands whose work is shared; of any other each process does all."""

_team = Team()


def here() -> Team:
    """The processes of the command that is running."""
    return _team


@contextmanager
def joined(command: str) -> Iterator[None]:
    """``here()`` is all processes of a shared command while the block runs."""
    global _team
    try:
        if command in SHARED:
            _team = join()
            _team.agree(lambda: command, "command", hint="All processes run one and the same.")
        yield
    finally:
        _team.close()
        _team = Team()


def hush(command: str) -> None:
    """Silences every process of a shared command but the first: they would all say the same."""
    with suppress(UsageError):
        launch = launched(os.environ) if command in SHARED else None
        if launch is not None and launch.rank > 0:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
