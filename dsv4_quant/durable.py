"""What survives a power loss, and what shows that it did: lines behind their hashes, folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3


def hashed_line(value: Mapping[str, Any]) -> bytes:
    """A JSON object as one line behind its own hash."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return _check(text) + b" " + text + b"\n"


def whole_lines(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(object, line) up to the first line that a power loss has torn, or that has lost a bit.

    Of the last line nothing but the newline may be missing.
    """
    for line in content.splitlines(keepends=True):
        check, _, text = line.rstrip(b"\n").partition(b" ")
        if check != _check(text):
            return
        yield json.loads(text), line


def _check(text: bytes) -> bytes:
    return blake3(text).hexdigest().encode()


def sync_folder(path: Path) -> None:
    """A rename is durable only when its folder is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
