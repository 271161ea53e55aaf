"""Where a command's result goes: text for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_quant.cli.together import here


def emit(text: str, result: Mapping[str, Any], *, json_to: str | None, quiet: bool) -> None:
    """Prints the text, unless quiet; writes the result to ``json_to`` ('-' is stdout, alone).

    Of several processes that share a command the first does.
    """
    if not here().is_first:
        return
    if json_to is not None:
        document = json.dumps(result, indent=2) + "\n"
        if json_to == "-":
            sys.stdout.write(document)
        else:
            Path(json_to).write_text(document, encoding="utf-8")
    if json_to != "-" and not quiet:
        print(text)
    sys.stdout.flush()  # a closed pipe is told now, not by the interpreter at exit
