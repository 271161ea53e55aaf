"""What a judge says: findings, and what was looked at to make them. Plain values; nothing prints.

A finding is an error (the checkpoint is not what it must be) or a warning (it may well be meant so,
but somebody should look). Errors fail a check; warnings never do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dsv4_quant.model import Reading

Severity = Literal["error", "warning"]
Level = Literal["structure", "checksums", "values", "forward"]

LEVELS: tuple[Level, ...] = ("structure", "checksums", "values", "forward")
"""From cheap to thorough; each includes those before it."""

CHECKS: Mapping[str, Level] = {
    "files": "structure",
    "headers": "structure",
    "config": "structure",
    "index": "structure",
    "tensors": "structure",
    "manifest": "checksums",
    "bytes": "checksums",
    "published": "checksums",
    "reading": "values",
    "numbers": "values",
    "blocks": "values",
    "expert ids": "values",
    "replicas": "values",
    "doubles": "values",
    "digests": "values",
    "against": "values",
    "fingerprint": "forward",
}
"""Every check, in the order of a report, and the level that it belongs to.

files       which files there are              headers     the safetensors headers
config      what the configs say               index       model.safetensors.index.json
tensors     names, dtypes, shapes              manifest    the manifest, SHA256SUMS, and each other
bytes       SHA-256 of every file              published   SHA-256 that the hub publishes
reading     the disk gives every byte          numbers     NaN, infinities, scales that are none
blocks      dead, saturated, odd scales        expert ids  the tables of hash-routed layers
replicas    equal tensors on all ranks         doubles     weights that are equal and should not be
digests     values against the manifest        against     values, config, files of another one
fingerprint the reference forward pass against a recorded one
"""

_ORDER = {check: place for place, check in enumerate(CHECKS)}
_NUMBER = re.compile(r"([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be.

    ``file`` is a name inside the folder, with /. ``expected`` and ``found`` can be compared by eye;
    ``found`` alone is a statement. ``meaning`` says what it means, or what to do.
    """

    severity: Severity
    check: str
    file: str | None
    tensor: str | None
    expected: str | None
    found: str
    meaning: str

    @property
    def level(self) -> Level:
        """The cheapest level that makes this finding."""
        return CHECKS[self.check]

    @property
    def what(self) -> str:
        """Expected and found, as one phrase."""
        return self.found if self.expected is None else (
            f"expected {self.expected}, found {self.found}"
        )  # fmt: skip

    def sort_key(self) -> tuple[Any, ...]:
        """Errors first, then as CHECKS stand, then by file and tensor, layer 2 before layer 10."""
        place = self.severity != "error", _ORDER[self.check]
        return *place, _natural(self.file), _natural(self.tensor), self.found


def _natural(text: str | None) -> list[tuple[int, str, int]]:
    parts = _NUMBER.split(text or "")
    return [(1, "", int(part)) if i % 2 else (0, part, 0) for i, part in enumerate(parts)]


def error(
    check: str,
    found: str,
    meaning: str,
    *,
    file: str | None = None,
    tensor: str | None = None,
    expected: str | None = None,
) -> Finding:
    """A finding that fails the check."""
    return Finding("error", check, file, tensor, expected, found, meaning)


def warning(
    check: str,
    found: str,
    meaning: str,
    *,
    file: str | None = None,
    tensor: str | None = None,
    expected: str | None = None,
) -> Finding:
    """A finding that somebody should look at."""
    return Finding("warning", check, file, tensor, expected, found, meaning)


@dataclass(frozen=True, slots=True)
class Check:
    """What one level looked at, and what it cost.

    ``tensors`` counts logical weights; ``skipped`` are those that the damage itself keeps from
    being judged. ``seconds`` is the time of all threads together.
    """

    level: str
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rounded:
    """Weights that a lossy conversion changed, next to a checkpoint that may be its source."""

    as_declared: int
    """How many are made of the other's values, with the error that the manifest states."""
    declared: int
    """How many the manifest says were changed."""
    sqnr: float | None
    """Of all requantised weights, as the manifest states it, in dB; None if it states no error."""

    def to_json(self) -> dict[str, Any]:
        """As JSON's own types."""
        sqnr = None if self.sqnr is None else round(self.sqnr, 4)
        return {"as_declared": self.as_declared, "declared": self.declared, "sqnr_db": sqnr}


@dataclass(frozen=True, slots=True)
class Report:
    """The whole verdict. ``findings`` are sorted; ``digest`` is there when every weight has one."""

    path: str
    level: Level
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    digest: str | None = None
    seconds: float = 0.0
    forward: str | None = None
    """The gate of the level ``forward``, why it applied, and its figures, in a line."""
    reading: Reading | None = None
    """What the level ``forward`` read, and how long it waited for that."""
    rounded: Rounded | None = None
    """Next to another checkpoint, of one whose manifest says what was requantised."""

    @property
    def errors(self) -> int:
        """How many findings fail the check."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """How many findings are only worth a look."""
        return len(self.findings) - self.errors

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong; warnings are allowed."""
        return self.errors == 0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON's own types."""
        return {
            "path": self.path,
            "level": self.level,
            "holds": self.holds,
            "errors": self.errors,
            "warnings": self.warnings,
            "value_digest": self.digest,
            "forward": self.forward,
            "reading": None if self.reading is None else self.reading.to_json(),
            "rounded": None if self.rounded is None else self.rounded.to_json(),
            "seconds": round(self.seconds, 3),
            "checks": [asdict(check) | {"seconds": round(check.seconds, 3)}
                       for check in self.checks],
            "findings": [asdict(finding) | {"level": finding.level} for finding in self.findings],
        }  # fmt: skip


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sorted, each once."""
    return tuple(sorted(set(findings), key=Finding.sort_key))
