"""A hub with one small checkpoint, and what talks to it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4_quant.hub.connection import Connection
from dsv4_quant.hub.repository import ask_repository
from tests.folders import golden
from tests.hub_server import Cut, Hub, Refuse, Trouble, serving


@pytest.fixture(autouse=True)
def _fresh_client() -> Iterator[None]:
    """No connection to a hub of another test is used again."""
    from huggingface_hub.utils import close_session

    yield
    close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serves the golden checkpoint with files of other kinds beside it."""
    root = Path(shutil.copytree(golden("tiny-fp4"), tmp_path / "served"))
    for name in ("tokenizer.json", "README.md", "inference/model.py", "pytorch_model.bin"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"content of {name}")
    with serving(root) as hub:
        yield hub


def connect(hub: Hub, pause: float = 0.001) -> Connection:
    """To the hub's repository as it is now."""
    return Connection(ask_repository(hub.repo, None, hub.url), pause=pause)


class Weather:
    """Cuts connections and refuses requests, at random but never for ever."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self.cuts = self.refusals = 0

    def __call__(self, name: str, start: int, stop: int) -> Trouble:
        luck = self._chance.random()
        if luck < 0.3 and stop > start:
            self.cuts += 1
            return Cut(self._chance.randrange(stop - start))
        if luck < 0.5:
            self.refusals += 1
            return Refuse(self._chance.choice([429, 500, 502, 503, 504]), None)
        return None
