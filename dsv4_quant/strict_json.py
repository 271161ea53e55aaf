"""JSON from strangers: bounded in size, every key once, no NaN, no Infinity, no lone surrogates.

``json.loads`` lets all of these through, and a small text can make it fill the memory: a value
costs two bytes of text and up to 250 bytes of objects. Here the values are counted before any is
made. Every fault is a ValueError with a short text, so that a reader has one thing to catch.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn


def parse(text: bytes, *, max_values: int, integers_only: bool = False) -> Any:
    """The value of a JSON text of at most about ``max_values`` values, keys not counted.

    With ``integers_only`` every number must be written as an integer that is not negative.
    Raises ValueError, and nothing else.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > max_values:
        raise ValueError(f"it holds more than {max_values:,} values")
    signed = integers_only and b"-" in text  # -0 is an int for Python, so it cannot be left to it
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_not_a_number,
            parse_float=_not_an_integer if integers_only else float,
            parse_int=_unsigned if signed else int,
        )
        if b"\\u" in text:  # an escape can spell half a character, which nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        found = str(error)
        if found.startswith("Exceeds the limit"):  # Python's own guard, in words for programmers
            found = "an integer has thousands of digits"
        raise ValueError(clip(found, 200)) from None
    return value


def clip(text: str, limit: int = 60) -> str:
    """The beginning of a text that may be long, on one line."""
    safe = text if text.isprintable() else ascii(text)[1:-1]
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def shown(value: Any) -> str:
    """A JSON value as an error message shows it: short, whatever it is."""
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} values"
    try:
        return clip(repr(value))
    except (ValueError, RecursionError):  # an integer of 5,000 digits, lists in lists
        return "too long to show"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {clip(twice)!r} occurs twice")
    return found


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _not_an_integer(text: str) -> NoReturn:
    raise ValueError(f"{clip(text)} is not an integer that counts something")


def _unsigned(text: str) -> int:
    if text.startswith("-"):
        _not_an_integer(text)
    return int(text)
