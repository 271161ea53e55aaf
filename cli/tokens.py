"""Token ids in a file: a JSON list of prompts, each a list of ids."""

from __future__ import annotations

from pathlib import Path

from dsv4_quant import strict_json
from dsv4_quant.errors import UnreadableError

MAX_BYTES = 4 << 20
MAX_PROMPTS, MAX_TOKENS = 1024, 1 << 16
"""More would not fit any memory: logits have a row of the vocabulary's length per token."""


def read_tokens(path: Path) -> list[list[int]]:
    """``[[0, 5, 17], [3]]`` as it is. Raises UnreadableError that says what is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        most = 2 * (MAX_PROMPTS + MAX_TOKENS)
        raw = strict_json.parse(path.read_bytes(), max_values=most, integers_only=True)
        return _prompts(raw)
    except OSError as error:
        raise UnreadableError(f"The tokens cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise UnreadableError(
            f"These are no prompts: {error}",
            file=path,
            hint="Write a list of lists of token ids, such as [[0, 5, 17], [3]].",
        ) from None


def _prompts(raw: object) -> list[list[int]]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_PROMPTS:
        raise ValueError(f"{strict_json.shown(raw)} is not a list of 1 to {MAX_PROMPTS:,} prompts")
    for number, prompt in enumerate(raw):
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"prompt {number} is {strict_json.shown(prompt)}, not a list of ids")
        if wrong := [token for token in prompt if type(token) is not int]:
            raise ValueError(f"prompt {number} holds {strict_json.shown(wrong[0])}, which is no id")
    total = sum(map(len, raw))
    if total > MAX_TOKENS:
        raise ValueError(
            f"they have {total:,} tokens together, at most {MAX_TOKENS:,} are possible"
        )
    return raw
