"""A driver for commands that several processes share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How the processes of a command ended, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]
    late: float
    """Seconds between the end of the first and the end of the last."""

    @property
    def said(self) -> str:
        """What all of them wrote to stderr."""
        return "".join(self.err)

    def all_said_at_once(self) -> str:
        """The one error message; there must be no other."""
        assert self.said.count("error:") == 1, self.err
        return " ".join(self.said.split())


class Processes:
    """Starts commands in some processes."""

    def __init__(self, driver: subprocess.Popen[str]) -> None:
        self._driver = driver

    def run(self, size: int, *argv: str | Path, folder: Path, **job: Any) -> Ended:
        """One command; ``faults``, ``folders``, ``patches`` as the driver takes them."""
        job |= {"size": size, "argv": [str(one) for one in argv], "folder": str(folder)}
        assert self._driver.stdin is not None and self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(job) + "\n")
        self._driver.stdin.flush()
        ended = Ended(**json.loads(self._driver.stdout.readline()))
        assert 99 not in ended.codes and -6 not in ended.codes, ended
        return ended


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """The driver, started once."""
    command = [sys.executable, "-m", "tests.team.driver"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as driver:
        yield Processes(driver)
        assert driver.stdin is not None
        driver.stdin.close()
