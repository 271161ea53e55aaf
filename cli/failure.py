"""How a command ends that could not do its work: one paragraph on stderr, and an exit code."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from dsv4_quant.cli.together import here, joined
from dsv4_quant.errors import Dsv4Error

WRONG = 2
"""Wrong usage, unreadable input, or anything else that kept the work from being done."""

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def guarded(command: Callable[..., None], name: str = "") -> Callable[..., None]:
    """The command with every failure told to the user; ``--debug`` is read from its arguments.

    Processes that share a command end with the same error, and one of them tells it.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            with joined(name):
                try:
                    command(*args, **kwargs)
                except (typer.Exit, typer.Abort, typer.BadParameter):
                    raise
                except (Exception, KeyboardInterrupt) as error:
                    raise typer.Exit(report(here().fail(error), debug=debug)) from None
        except (Dsv4Error, KeyboardInterrupt) as error:  # the processes did not come together
            raise typer.Exit(report(error, debug=debug)) from None

    return run


def report(error: BaseException, *, debug: bool) -> int:
    """Tells of a failure on stderr and returns the exit code."""

    def say() -> None:
        stream = sys.stderr if here().is_first else sys.__stderr__  # the others are silenced
        with suppress(OSError):  # stderr itself may be closed
            if debug:
                traceback.print_exception(error, file=stream)
            print(wrapped(explain(error)), file=stream, flush=True)

    here().tell(say)
    if isinstance(error, BrokenPipeError):  # or Python complains again when it flushes at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else WRONG


def explain(error: BaseException) -> str:
    """What happened and what to do about it, as one paragraph."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, Dsv4Error):
        return f"error: {error.paragraph()}"
    if isinstance(error, BrokenPipeError):
        return "error: Whoever read the output stopped before its end."
    if isinstance(error, OSError):
        where = f" (file {error.filename})" if error.filename else ""
        return f"error: The system refused: {error.strerror or error}{where}."
    if isinstance(error, MemoryError):
        return (
            "error: The memory ran out. End other programs, or give this one less to hold with"
            " --max-memory or --workers where the command has them."
        )
    if isinstance(error, ImportError):
        return f"error: A library that this command needs cannot be loaded: {_line(error)}."
    return (
        f"error: A bug in dsv4-quant: {type(error).__name__}: {_line(error)}. Please report it,"
        " with what --debug prints."
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def wrapped(paragraph: str) -> str:
    """Filled to the terminal's width; paths and names are never broken."""
    width = shutil.get_terminal_size((80, 24)).columns
    return textwrap.fill(paragraph, max(width, 20), break_long_words=False, break_on_hyphens=False)
