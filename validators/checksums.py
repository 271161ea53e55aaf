"""The second level: SHA-256 of every file against what is said of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS
from dsv4_quant.checkpoint.reader import Bytes
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.claims import HUB, Claims
from dsv4_quant.validators.report import Finding, error, warning


def hash_file(path: Path, buffer: Bytes, advance: Callable[[int], None]) -> str:
    """SHA-256 of a file, read through the buffer. Raises OSError."""
    sha, view = hashlib.sha256(), buffer.data
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            sha.update(view[:count])
            advance(count)
    return sha.hexdigest()


def files_to_hash(claims: Claims, sizes: dict[str, int]) -> list[str]:
    """Files that are there in the length that they must have; the others need no hash."""
    return [
        name for name, size in sizes.items()
        if name in claims.sha256 and claims.bytes.get(name, size) == size
    ]  # fmt: skip


def judge_hashes(
    claims: Claims, sizes: dict[str, int], hashes: dict[str, str]
) -> Iterator[Finding]:
    """Files that are missing, unknown, of another length or of another hash."""
    for file, said in claims.sha256.items():
        check = "published" if said.keys() == {HUB} else "bytes"
        name = clip(file, 255)
        if file not in sizes:
            yield error(check, "missing", f"{_who(said)} names it: the copy is not complete.",
                        file=name, expected="a file")  # fmt: skip
        elif claims.bytes.get(file, sizes[file]) != sizes[file]:
            yield error("bytes", f"{sizes[file]:,} bytes", "Truncated, grown, or another file.",
                        file=name, expected=f"{claims.bytes[file]:,} bytes")  # fmt: skip
        elif file in hashes:
            yield from _judge_hash(name, said, hashes[file])
    unknown = sizes.keys() - claims.sha256.keys() - {MANIFEST, SUMS}
    if any(MANIFEST in said or SUMS in said for said in claims.sha256.values()):
        for file in unknown:
            say = error if file.endswith(".safetensors") else warning
            meaning = "Added later: nobody says what it must be."
            yield say("bytes", "a file that the manifest does not name", meaning,
                      file=clip(file, 255))  # fmt: skip


def _judge_hash(name: str, said: dict[str, str], sha256: str) -> Iterator[Finding]:
    wrong = {source: hash for source, hash in said.items() if hash != sha256}
    if HUB in wrong:
        yield error("published", f"sha256 {sha256}",
                    "Not the file that the hub publishes for this revision.",
                    file=name, expected=f"sha256 {wrong.pop(HUB)}")  # fmt: skip
    if wrong:
        source = MANIFEST if MANIFEST in wrong else SUMS
        yield error("bytes", f"sha256 {sha256}",
                    f"Not the file that {source} describes: damaged, edited, or another"
                    " revision's.",
                    file=name, expected=f"sha256 {wrong[source]}")  # fmt: skip


def _who(said: dict[str, str]) -> str:
    return next(source for source in (MANIFEST, SUMS, HUB) if source in said)
