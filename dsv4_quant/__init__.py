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
    from dsv4_quant.checkpoint.reader import Checkpoint
    from dsv4_quant.convert.request import Request
    from dsv4_quant.convert.run import convert
    from dsv4_quant.convert.summary import plan_conversion
    from dsv4_quant.inspection import inspect
    from dsv4_quant.synth import synth

__version__ = "0.1.0"

_VERBS = {
    "Checkpoint": "dsv4_quant.checkpoint.reader",
    "Request": "dsv4_quant.convert.request",
    "convert": "dsv4_quant.convert.run",
    "inspect": "dsv4_quant.inspection",
    "plan_conversion": "dsv4_quant.convert.summary",
    "synth": "dsv4_quant.synth",
}

__all__ = ["Checkpoint", "Request", "convert", "inspect", "plan_conversion", "synth"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'dsv4_quant' has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)
