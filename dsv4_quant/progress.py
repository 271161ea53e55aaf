"""How long work tells somebody about itself; the library never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a caller may hand to long work. Methods are called from any thread."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def total(self, count: int) -> None:
        """How many bytes this part will go through."""

    def advance(self, count: int) -> None:
        """That many more bytes are done."""


class NoProgress:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def total(self, count: int) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""
