"""Findings in order, and the forms in which a report leaves the library."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from dsv4_quant.validators.junit import to_junit
from dsv4_quant.validators.report import CHECKS, LEVELS, Check, Report, error, ordered, warning

FINDINGS = [
    warning("headers", "odd", "Look.", file="a"),
    error("against", "differs", "Changed.", tensor="layers.10.x"),
    error("against", "differs", "Changed.", tensor="layers.2.x"),
    error("headers", "broken", "Fetch it again.", file="model-00002.safetensors", expected="whole"),
    error("headers", "broken", "Fetch it again.", file="model-00002.safetensors", expected="whole"),
]


def report(*findings: object) -> Report:
    checks = (Check("structure", 3, 308, 1000, 0, 0.5), Check("values", 3, 300, 9000, 8, 1.5))
    return Report("/some/where", "values", checks, ordered(findings), None, 2.0)  # type: ignore[arg-type]


def test_findings_are_sorted_and_each_stands_once() -> None:
    found = [(f.severity, f.check, f.tensor) for f in ordered(FINDINGS)]
    assert found == [
        ("error", "headers", None),
        ("error", "against", "layers.2.x"),
        ("error", "against", "layers.10.x"),
        ("warning", "headers", None),
    ]


def test_only_errors_fail() -> None:
    assert report().holds
    assert report(FINDINGS[0]).holds
    said = report(*FINDINGS)
    assert (said.holds, said.errors, said.warnings) == (False, 3, 1)


def test_every_check_belongs_to_a_level() -> None:
    assert set(CHECKS.values()) == set(LEVELS)
    assert [f.level for f in ordered(FINDINGS)] == ["structure", "values", "values", "structure"]


def test_json_holds_everything() -> None:
    said = json.loads(json.dumps(report(*FINDINGS).to_json()))
    assert (said["holds"], said["errors"], said["warnings"]) == (False, 3, 1)
    assert said["checks"][1] == {
        "level": "values", "files": 3, "tensors": 300, "bytes": 9000, "skipped": 8, "seconds": 1.5,
    }  # fmt: skip
    assert said["findings"][0] == {
        "severity": "error", "check": "headers", "level": "structure", "tensor": None,
        "file": "model-00002.safetensors", "expected": "whole", "found": "broken",
        "meaning": "Fetch it again.",
    }  # fmt: skip


def test_junit_counts_what_it_lists() -> None:
    root = ET.fromstring(to_junit(report(*FINDINGS)))
    suite = root[0]
    cases = suite.findall("testcase")
    assert [root.get(key) for key in ("tests", "failures")] == ["6", "3"]
    assert [suite.get(key) for key in ("tests", "failures")] == ["6", "3"]
    assert len(cases) == 6
    failures = [case.find("failure") for case in cases if case.find("failure") is not None]
    assert [f.get("message") for f in failures if f is not None] == [
        "expected whole, found broken", "differs", "differs",
    ]  # fmt: skip
    assert cases[2].get("classname") == "verify.structure.headers"
    assert cases[2].get("name") == "model-00002.safetensors"
    passed = cases[5].find("system-out")
    assert passed is not None
    assert passed.text == "warning: odd. Look."


def test_junit_survives_names_that_xml_cannot_hold() -> None:
    name = "a\x00b\ud800c\x1b[31m<&\"'>￾"
    root = ET.fromstring(to_junit(report(error("files", f"{name}!", "Bad.", file=name))))
    case = root[0].findall("testcase")[2]
    assert case.get("name") == "a�b�c�[31m<&\"'>�"
