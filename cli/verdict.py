"""A report of ``verify`` as text for people, and as annotations for GitHub."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv4_quant.cli.reading import describe_reading
from dsv4_quant.cli.tables import filled, short, size, table
from dsv4_quant.validators.junit import to_junit
from dsv4_quant.validators.report import Finding, Report, Rounded

SHOWN = 10
"""Findings of one kind that are printed; GitHub, too, shows ten annotations of a step."""

_HASH = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{48}\b")


def tell(report: Report, junit: str | None) -> None:
    """What goes elsewhere than to standard output: the JUnit file, GitHub's annotations."""
    if junit is not None:
        Path(junit).write_bytes(to_junit(report))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_lines(report):
            print(line, file=sys.stderr)


def describe(report: Report) -> str:
    """The verdict first, then what was looked at, then every kind of finding."""
    parts = [_verdict(report)]
    if report.digest is not None:
        parts[0] += f"\nvalue digest {report.digest}"
    if report.rounded is not None and report.rounded.as_declared:
        parts[0] += f"\n{_rounded(report.rounded)}"
    if report.forward is not None:
        parts += [filled(f"forward: {report.forward}")]
    if report.reading is not None:
        parts[-1] += "\n" + filled(describe_reading(report.reading))
    rows = [
        [
            check.level,
            f"{check.files:,}",
            f"{check.tensors:,}" if check.tensors else "",
            f"{check.skipped:,}" if check.skipped else "",
            size(check.bytes),
            short(check.seconds),
        ]
        for check in report.checks
    ]
    head = ["level", "files", "weights", "not judged", "read", "thread time"]
    parts.append(table(head, rows, "<>>>>>"))
    parts += findings_text(report.findings)
    return "\n\n".join(parts)


def _verdict(report: Report) -> str:
    counts = [(report.errors, "error"), (report.warnings, "warning")]
    said = " and ".join(f"{n:,} {what}{'s' if n > 1 else ''}" for n, what in counts if n)
    word = "HOLDS" if report.holds else "DAMAGED"
    read = sum(check.bytes for check in report.checks)
    weights = max((check.tensors for check in report.checks), default=0)
    return (
        f"{word}: {said or 'nothing found'}; level {report.level}, {weights:,} weights,"
        f" {size(read)} read in {short(report.seconds)}"
    )


def _rounded(rounded: Rounded) -> str:
    count = f"{rounded.as_declared:,}"
    if rounded.as_declared != rounded.declared:
        count += f" of {rounded.declared:,}"
    sqnr = "" if rounded.sqnr is None else f", SQNR {rounded.sqnr:.2f} dB as the manifest states it"
    return f"rounded as declared: {count} weights{sqnr}"


def findings_text(findings: Iterable[Finding]) -> Iterator[str]:
    """One paragraph per kind of finding, the first ones with where and what; 80 columns."""
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:  # kinds take turns where a weight and its scale are both missing
        kinds.setdefault((one.severity, one.check, one.meaning), []).append(one)
    for (severity, check, meaning), some in kinds.items():
        count = f", {len(some):,} times" if len(some) > 1 else ""
        lines = [f"{severity.upper()} {check}{count}", filled(meaning, "  ")]
        for finding in some[:SHOWN]:
            where = [part for part in (finding.file, finding.tensor) if part]
            lines += [filled(" ".join(where), "  - ")] if where else []
            lines.append(filled(_HASH.sub(r"\1...", finding.what), "    "))
        if len(some) > SHOWN:
            lines.append(f"  ... and {len(some) - SHOWN:,} more; --json FILE has all of them")
        yield "\n".join(lines)


def github_lines(report: Report) -> Iterator[str]:
    """GitHub's workflow commands: the findings that it will show, errors first."""
    for severity in ("error", "warning"):
        same = [finding for finding in report.findings if finding.severity == severity]
        for finding in same[:SHOWN]:
            path = f"{report.path}/{finding.file}" if finding.file else report.path
            place = f"file={_property(path)},title={_property(f'verify: {finding.check}')}"
            tensor = f"{finding.tensor}: " if finding.tensor else ""
            yield f"::{severity} {place}::{_escaped(f'{tensor}{finding.what}. {finding.meaning}')}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
