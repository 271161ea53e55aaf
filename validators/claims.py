"""What manifest, SHA256SUMS, B3SUMS and the hub say of the files' hashes, and if they agree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_quant.checkpoint.folder import check_inside
from dsv4_quant.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from dsv4_quant.checkpoint.sums import LISTS, HashKind
from dsv4_quant.errors import ManifestError, UnreadableError, some
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.report import Finding, error, warning
from dsv4_quant.validators.requantised import judge_requantised
from dsv4_quant.validators.subject import Subject

MAX_LIST_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\\].*)")

HUB = "the hub"

Hash = tuple[HashKind, str]


@dataclass(slots=True)
class Claims:
    """What is said of the files' hashes. ``hashes``: file -> who says it -> kind and hash."""

    hashes: dict[str, dict[str, Hash]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    manifest: Manifest | None = None

    def add(self, file: str, source: str, kind: HashKind, hash: str) -> None:
        """One more source for a file's hash."""
        self.hashes.setdefault(file, {})[source] = kind, hash


def read_claims(subject: Subject, published: Mapping[str, str]) -> tuple[Claims, list[Finding]]:
    """Reads the manifest and the lists of hashes; findings are what is wrong with themselves.

    ``published``: SHA-256 that the hub gives, by file.
    """
    claims, findings = Claims(), []
    root = subject.root
    has_manifest = os.path.lexists(root / MANIFEST)
    if has_manifest:
        try:
            check_inside(root, root / MANIFEST)
            claims.manifest = read_manifest(root / MANIFEST)
        except UnreadableError as wrong:
            findings.append(_unreadable(MANIFEST, wrong))
    lists: dict[HashKind, dict[str, str]] = {}
    for kind, name in LISTS.items():
        if os.path.lexists(root / name):
            try:
                lists[kind] = _read_list(root, name)
            except UnreadableError as wrong:
                lists[kind] = {}
                findings.append(_unreadable(name, wrong))
    kind = claims.manifest.hash_kind if claims.manifest else next(iter(lists), "sha256")
    if has_manifest and kind not in lists:
        name = LISTS[kind]
        findings.append(
            error("manifest", "missing", f"Only {name} says what the manifest itself must be.",
                  file=name, expected=f"{name} beside the manifest")
        )  # fmt: skip
    if claims.manifest is not None:
        for file, record in claims.manifest.files.items():
            claims.add(file, MANIFEST, record.kind, record.hash)
            claims.bytes[file] = record.bytes
        if held := lists.get(claims.manifest.hash_kind):
            findings += _contradictions(claims.manifest, held)
        findings += _judge_manifest(subject, claims.manifest)
        findings += judge_requantised(claims.manifest, subject.catalogue)
    for kind, hashes in lists.items():
        for file, hash in hashes.items():
            claims.add(file, LISTS[kind], kind, hash)
    for file, sha256 in published.items():
        claims.add(file, HUB, "sha256", sha256)
    if not has_manifest and not lists:
        findings.append(_nothing_said(published))
    return claims, findings


def _nothing_said(published: Mapping[str, str]) -> Finding:
    rest = "Only the hub's hashes can be checked." if published else "No byte can be checked."
    return warning("manifest", "no manifest",
                   f"{rest} `dsv4-quant manifest` makes one from a folder that you trust.",
                   file=MANIFEST)  # fmt: skip


def _unreadable(file: str, wrong: UnreadableError) -> Finding:
    return error("manifest", wrong.what.rstrip("."), wrong.hint or "Damaged, or edited.", file=file)


def _read_list(root: Path, name: str) -> dict[str, str]:
    path = root / name
    check_inside(root, path)
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ManifestError(f"{name} is larger than 16 MiB", file=path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as wrong:
        raise ManifestError(f"Cannot be read: {wrong.strerror}", file=path) from None
    except ValueError:
        raise ManifestError(f"{name} is not text", file=path) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            tool = "sha256sum" if name == LISTS["sha256"] else "b3sum"
            raise ManifestError(f"Line {number} is no line of {tool}: {clip(line)}", file=path)
        found[match[2]] = match[1]
    return found


def _contradictions(manifest: Manifest, held: dict[str, str]) -> Iterator[Finding]:
    """The list must say of every file what the manifest says, and name the manifest too."""
    name = LISTS[manifest.hash_kind]
    meaning = f"{name} and the manifest were written together: one of both was edited."
    said = {file: record.hash for file, record in manifest.files.items()}
    for file in sorted(said.keys() | held.keys() - {MANIFEST}):
        if said.get(file) != held.get(file):
            yield error("manifest", f"{clip(file, 255)} {held.get(file, 'not named')}", meaning,
                        file=name, expected=said.get(file, "no such line"))  # fmt: skip
    if MANIFEST not in held:
        yield error("manifest", f"{MANIFEST} not named", meaning, file=name, expected="its hash")


def _judge_manifest(subject: Subject, manifest: Manifest) -> Iterator[Finding]:
    """The manifest must speak of a checkpoint of this shape."""
    folder, catalogue = subject.folder, subject.catalogue
    facts: list[tuple[str, object, object]] = [
        ("layout", folder.layout, manifest.layout),
        ("gpus", folder.gpus, manifest.gpus),
    ]
    if catalogue is not None:
        held = catalogue.formats
        facts += [
            (f"formats.{key}", str(getattr(held, key)), manifest.formats.get(key))
            for key in ("experts", "dense", "wo_a")
        ]
        lacking = catalogue.specs.keys() - manifest.tensors.keys()
        if lacking:
            facts.append(("tensors", f"also {some(lacking)}", f"{len(manifest.tensors):,} names"))
        extra = manifest.tensors.keys() - catalogue.specs.keys()
        if extra:
            facts.append(("tensors", f"{len(catalogue.specs):,} names", f"also {some(extra)}"))
    for key, holds, says in facts:
        if holds != says:
            yield error("manifest", f"{key} {says}", "The manifest is another checkpoint's.",
                        file=MANIFEST, expected=f"{key} {holds}")  # fmt: skip
