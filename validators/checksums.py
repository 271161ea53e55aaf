"""The second level: the hash of every file against what is said of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from dsv4_quant.checkpoint.ahead import WINDOW, will_read
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.checkpoint.reader import Bytes
from dsv4_quant.checkpoint.sums import LISTS, HashKind, new_hash
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.claims import HUB, Claims, Hash
from dsv4_quant.validators.report import Finding, error, warning

Hashes = Mapping[HashKind, str]
"""Of one file, by kind: of those kinds in which somebody says what it must be."""


def hash_file(
    path: Path, kinds: Collection[HashKind], buffer: Bytes, advance: Callable[[int], None]
) -> dict[HashKind, str]:
    """A file's hashes of these kinds, read once, through the buffer. Raises OSError."""
    hashes, view = {kind: new_hash(kind) for kind in kinds}, buffer.data
    with path.open("rb", buffering=0) as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        will_read(file.fileno(), 0, min(WINDOW, end))
        while count := file.readinto(view):
            will_read(file.fileno(), at + WINDOW, min(at + WINDOW + count, end))
            at += count
            for hash in hashes.values():
                hash.update(view[:count])
            advance(count)
    return {kind: hash.hexdigest() for kind, hash in hashes.items()}


def files_to_hash(claims: Claims, sizes: dict[str, int]) -> dict[str, set[HashKind]]:
    """Files that are there in the length that they must have; the others need no hash."""
    return {
        name: {kind for kind, _ in claims.hashes[name].values()}
        for name, size in sizes.items()
        if name in claims.hashes and claims.bytes.get(name, size) == size
    }


def judge_hashes(
    claims: Claims, sizes: dict[str, int], hashes: Mapping[str, Hashes]
) -> Iterator[Finding]:
    """Files that are missing, unknown, of another length or of another hash."""
    for file, said in claims.hashes.items():
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
    unknown = sizes.keys() - claims.hashes.keys() - {MANIFEST, *LISTS.values()}
    if any(said.keys() - {HUB} for said in claims.hashes.values()):
        for file in unknown:
            say = error if file.endswith(".safetensors") else warning
            meaning = "Added later: nobody says what it must be."
            yield say("bytes", "a file that the manifest does not name", meaning,
                      file=clip(file, 255))  # fmt: skip


def _judge_hash(name: str, said: Mapping[str, Hash], hashes: Hashes) -> Iterator[Finding]:
    wrong = {source: hash for source, hash in said.items() if hashes[hash[0]] != hash[1]}
    if HUB in wrong:
        kind, hash = wrong.pop(HUB)
        yield error("published", f"{kind} {hashes[kind]}",
                    "Not the file that the hub publishes for this revision.",
                    file=name, expected=f"{kind} {hash}")  # fmt: skip
    if wrong:
        source = _who(wrong)
        kind, hash = wrong[source]
        yield error("bytes", f"{kind} {hashes[kind]}",
                    f"Not the file that {source} describes: damaged, edited, or another"
                    " revision's.",
                    file=name, expected=f"{kind} {hash}")  # fmt: skip


def _who(said: Mapping[str, Hash]) -> str:
    return next(source for source in (MANIFEST, *LISTS.values(), HUB) if source in said)
