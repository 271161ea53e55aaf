"""What the manifest, SHA256SUMS and the hub say of the files' hashes, and whether they agree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_quant.checkpoint.folder import check_inside
from dsv4_quant.checkpoint.manifest import MANIFEST, SUMS, Manifest, read_manifest
from dsv4_quant.errors import ManifestError, UnreadableError, some
from dsv4_quant.strict_json import clip
from dsv4_quant.validators.report import Finding, error, warning
from dsv4_quant.validators.subject import Subject

MAX_SUMS_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\\].*)")

HUB = "the hub"


@dataclass(slots=True)
class Claims:
    """What is said of the files' hashes. ``sha256``: file -> who says it -> hash."""

    sha256: dict[str, dict[str, str]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    manifest: Manifest | None = None

    def add(self, file: str, source: str, sha256: str) -> None:
        """One more source for a file's hash."""
        self.sha256.setdefault(file, {})[source] = sha256


def read_claims(subject: Subject, published: Mapping[str, str]) -> tuple[Claims, list[Finding]]:
    """Reads the manifest and SHA256SUMS; findings are what is wrong with themselves.

    ``published``: hashes that the hub gives, by file.
    """
    claims, findings = Claims(), []
    root = subject.root
    has_manifest, has_sums = (os.path.lexists(root / name) for name in (MANIFEST, SUMS))
    if has_manifest:
        try:
            check_inside(root, root / MANIFEST)
            claims.manifest = read_manifest(root / MANIFEST)
        except UnreadableError as wrong:
            findings.append(_unreadable(MANIFEST, wrong))
    sums: dict[str, str] = {}
    if has_sums:
        try:
            sums = _read_sums(root)
        except UnreadableError as wrong:
            findings.append(_unreadable(SUMS, wrong))
    elif has_manifest:
        findings.append(
            error("manifest", "missing", "Only SHA256SUMS says what the manifest itself must be.",
                  file=SUMS, expected="SHA256SUMS beside the manifest")
        )  # fmt: skip
    if claims.manifest is not None:
        for file, record in claims.manifest.files.items():
            claims.add(file, MANIFEST, record.sha256)
            claims.bytes[file] = record.bytes
        if sums:
            findings += _contradictions(claims.manifest, sums)
        findings += _judge_manifest(subject, claims.manifest)
    for file, sha256 in sums.items():
        claims.add(file, SUMS, sha256)
    for file, sha256 in published.items():
        claims.add(file, HUB, sha256)
    if not has_manifest and not has_sums:
        findings.append(_nothing_said(published))
    return claims, findings


def _nothing_said(published: Mapping[str, str]) -> Finding:
    rest = "Only the hub's hashes can be checked." if published else "No byte can be checked."
    return warning("manifest", "no manifest",
                   f"{rest} `dsv4-quant manifest` makes one from a folder that you trust.",
                   file=MANIFEST)  # fmt: skip


def _unreadable(file: str, wrong: UnreadableError) -> Finding:
    return error("manifest", wrong.what.rstrip("."), wrong.hint or "Damaged, or edited.", file=file)


def _read_sums(root: Path) -> dict[str, str]:
    path = root / SUMS
    check_inside(root, path)
    try:
        if path.stat().st_size > MAX_SUMS_BYTES:
            raise ManifestError("SHA256SUMS is larger than 16 MiB", file=path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as wrong:
        raise ManifestError(f"Cannot be read: {wrong.strerror}", file=path) from None
    except ValueError:
        raise ManifestError("SHA256SUMS is not text", file=path) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise ManifestError(f"Line {number} is no line of sha256sum: {clip(line)}", file=path)
        found[match[2]] = match[1]
    return found


def _contradictions(manifest: Manifest, sums: dict[str, str]) -> Iterator[Finding]:
    """SHA256SUMS must say of every file what the manifest says, and name the manifest too."""
    meaning = "SHA256SUMS and the manifest were written together: one of both was edited."
    said = {name: record.sha256 for name, record in manifest.files.items()}
    for name in sorted(said.keys() | sums.keys() - {MANIFEST}):
        if said.get(name) != sums.get(name):
            yield error("manifest", f"{clip(name, 255)} {sums.get(name, 'not named')}", meaning,
                        file=SUMS, expected=said.get(name, "no such line"))  # fmt: skip
    if MANIFEST not in sums:
        yield error("manifest", f"{MANIFEST} not named", meaning, file=SUMS, expected="its hash")


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
