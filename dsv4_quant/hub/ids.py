"""What is an id, which files of a repository a checkpoint needs, and what the hub's errors mean."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import NoReturn

from dsv4_quant.errors import DiskSpaceError, Dsv4Error, UnreadableError, UsageError
from dsv4_quant.strict_json import clip

WANTED = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "*.txt", "*.md", "LICENSE*",
)  # fmt: skip
"""Weights, configs, tokenizer, the published code and texts; pickles are never fetched."""

UNWANTED = ("*/*.safetensors", "*.bin", "*.pt", "*.pth", ".*")
"""Weights in subfolders are another checkpoint's."""

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.][\w./-]*))?", re.ASCII)


def parse_id(src: str | Path) -> tuple[str, str | None]:
    """``owner/name`` and the revision behind the @, if there is one. Raises UnreadableError."""
    match = _ID.fullmatch(str(src))
    if match is None:
        raise UnreadableError(
            f"There is no folder {str(src)!r}, and it is no Hugging Face id",
            hint="An id looks like deepseek-ai/DeepSeek-V4-Flash, or with @revision at its end.",
        )
    return match[1], match[2]


def explain(repo: str, revision: str | None, error: Exception) -> NoReturn:
    """Raises what huggingface-hub's error means for a user of this tool."""
    from huggingface_hub import errors

    found: Dsv4Error
    cause = clip(" ".join(str(error.__cause__ or error).split()), 300) or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        found = UsageError(
            f"{repo} is gated: its owner lets only known users download it",
            hint="Accept its terms on the hub's site, then log in with `hf auth login`.",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = UsageError(
            f"The hub has no {repo} that you may see, and there is no folder of that name",
            hint="Check the spelling; for a private one log in with `hf auth login`.",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        found = UsageError(
            f"{repo} has no revision {revision!r}", hint="Give a branch, a tag or a commit."
        )
    elif isinstance(error, errors.LocalEntryNotFoundError):
        found = UnreadableError(
            f"The hub cannot be reached, and the cache does not hold all of {repo}"
            f"{f' at {revision!r}' if revision else ''}: {cause}",
            hint="Is the network up, or HF_HUB_OFFLINE set? A folder of files works as well.",
        )
    elif isinstance(error, errors.HFValidationError):
        found = UsageError(f"{repo!r} is not an id that the hub can have")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        found = DiskSpaceError(
            f"The disk is full before {repo} is complete",
            hint="Make room, or set HF_HOME to a folder on a larger disk; what is here is kept.",
        )
    else:
        found = UnreadableError(
            f"The download of {repo} failed: {cause}",
            hint="Run the same command again: what is complete is kept.",
        )
    raise found from None
