"""Hashes of whole files: SHA-256, or BLAKE3 where time counts more than what everybody has.

``sha256sum -c`` is on every machine, and the hub publishes SHA-256, so that is what is written
unless somebody asks. It is also the most expensive part of a conversion that copies (BUDGET.md in
``benchmarks``): BLAKE3 takes a quarter of it, and its list is checked by ``b3sum -c``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self

from blake3 import blake3

HashKind = Literal["sha256", "blake3"]

LISTS: Mapping[HashKind, str] = {"sha256": "SHA256SUMS", "blake3": "B3SUMS"}
"""The list of a folder's hashes, by kind: lines such as ``sha256sum`` and ``b3sum`` print them."""


class FileHash(Protocol):
    """A hash in the making."""

    def update(self, data: Any, /) -> object:
        """Goes on with these bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far."""

    def copy(self) -> Self:
        """Another one that can go on from here."""


def new_hash(kind: HashKind) -> FileHash:
    """A hash of no bytes yet."""
    return hashlib.sha256() if kind == "sha256" else blake3()
