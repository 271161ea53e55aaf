"""A report as JUnit XML, the form that CI systems show test results in.

Every level that was judged is a test case, and every finding one more: an error is a failure, a
warning passes and says its text in ``system-out``.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from dsv4_quant.validators.report import Check, Finding, Report

_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document may hold; a file's name may."""


def to_junit(report: Report) -> bytes:
    """The XML document, UTF-8."""
    cases = len(report.checks) + len(report.findings)
    counts = {"tests": str(cases), "failures": str(report.errors), "errors": "0"}
    time = f"{report.seconds:.3f}"
    root = ET.Element("testsuites", {"name": "dsv4-quant verify", **counts, "time": time})
    name = _clean(f"verify {report.path}")
    suite = ET.SubElement(root, "testsuite", {"name": name, **counts, "time": time})
    for check in report.checks:
        suite.append(_check_case(check))
    for finding in report.findings:
        suite.append(_finding_case(finding))
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _check_case(check: Check) -> ET.Element:
    case = ET.Element(
        "testcase",
        {"classname": "verify", "name": check.level, "time": f"{check.seconds:.3f}"},
    )
    said = f"{check.files} files, {check.tensors} weights, {check.bytes} bytes"
    skipped = f", {check.skipped} weights could not be judged" if check.skipped else ""
    ET.SubElement(case, "system-out").text = said + skipped
    return case


def _finding_case(finding: Finding) -> ET.Element:
    where = " ".join(part for part in (finding.file, finding.tensor) if part) or "checkpoint"
    case = ET.Element(
        "testcase",
        {
            "classname": f"verify.{finding.level}.{finding.check}",
            "name": _clean(where),
            "time": "0",
        },
    )
    text = _clean(f"{finding.what}. {finding.meaning}")
    if finding.severity == "error":
        failure = {"message": _clean(finding.what), "type": finding.check}
        ET.SubElement(case, "failure", failure).text = text
    else:
        ET.SubElement(case, "system-out").text = f"warning: {text}"
    return case


def _clean(text: str) -> str:
    return _NO_XML.sub("�", text)
