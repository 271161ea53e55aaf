"""How long work tells somebody about itself; the library never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a caller may hand to long work. Methods are called from any thread.

    A method may raise: that ends the work, as an error of its own would.
    """

    def stage(self, text: str, unit: str = "B") -> None:
        """A new part of the work begins; it is counted in bytes, or in something else (plural)."""

    def total(self, count: int) -> None:
        """How many bytes (or units) this part will go through."""

    def advance(self, count: int) -> None:
        """That many more of them are done."""

    def read(self, count: int) -> None:
        """So many bytes were read in this part, which is counted in something else."""

    def note(self, text: str) -> None:
        """Something to know that is no error, in a line."""


class NoProgress:
    """Tells nobody."""

    def stage(self, text: str, unit: str = "B") -> None:
        """Nothing."""

    def total(self, count: int) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""

    def read(self, count: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
