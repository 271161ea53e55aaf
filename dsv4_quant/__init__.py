"""Convert, requantise, prove, repack and verify DeepSeek-V4 checkpoints.

The verbs of the command line as functions that return reports and never print::

    import dsv4_quant
    dsv4_quant.convert("DeepSeek-V4-Flash", "flash-fp8", dsv4_quant.Request("mp", 8, "fp8"))

Each is imported when it is first used, so that ``import dsv4_quant`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_quant.checkpoint.digesting import digest
    from dsv4_quant.checkpoint.reader import Checkpoint
    from dsv4_quant.conversion.request import Request
    from dsv4_quant.conversion.run import convert
    from dsv4_quant.conversion.summary import plan_conversion
    from dsv4_quant.fingerprints.make import make_fingerprint
    from dsv4_quant.hub import resolve
    from dsv4_quant.inspection import inspect
    from dsv4_quant.model.forward import forward
    from dsv4_quant.synthesis import synth
    from dsv4_quant.validators.pin import make_manifest
    from dsv4_quant.validators.verify import verify

__version__ = "0.1.0"

_VERBS = {
    "Checkpoint": "dsv4_quant.checkpoint.reader",
    "Request": "dsv4_quant.conversion.request",
    "convert": "dsv4_quant.conversion.run",
    "digest": "dsv4_quant.checkpoint.digesting",
    "forward": "dsv4_quant.model.forward",
    "inspect": "dsv4_quant.inspection",
    "make_fingerprint": "dsv4_quant.fingerprints.make",
    "make_manifest": "dsv4_quant.validators.pin",
    "plan_conversion": "dsv4_quant.conversion.summary",
    "resolve": "dsv4_quant.hub",
    "synth": "dsv4_quant.synthesis",
    "verify": "dsv4_quant.validators.verify",
}
"""Verb -> the module that holds it. No module may have a verb's name: importing it would win."""

__all__ = [
    "Checkpoint",
    "Request",
    "convert",
    "digest",
    "forward",
    "inspect",
    "make_fingerprint",
    "make_manifest",
    "plan_conversion",
    "resolve",
    "synth",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'dsv4_quant' has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)
