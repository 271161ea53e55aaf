"""The command line: ``dsv4-quant COMMAND``, and ``python -m dsv4_quant COMMAND``.

A command is a file of this folder with a function ``command``, and a line in COMMANDS. Its module
is imported when the command is asked for and not before, so that it can import what it needs at
its top, like any module, and ``--help`` still answers at once.
"""

from __future__ import annotations

import gc
import resource
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from dsv4_quant import __version__
from dsv4_quant.cli.failure import INTERRUPTED, guarded, report
from dsv4_quant.cli.together import hush

COMMANDS = {
    "inspect": "What a checkpoint holds, from its headers alone.",
    "convert": "Convert a checkpoint: another layout, GPU count or format of the experts.",
    "repack": "Split a checkpoint over another number of GPUs, or put it back together.",
    "demo": "The whole loop on a small synthetic checkpoint, in under a minute.",
    "verify": "Judge a checkpoint: structure, every byte, every number.",
    "digest": "The value digest: one line that says which numbers a checkpoint holds.",
    "manifest": "Make manifest and SHA256SUMS for a checkpoint that has none.",
    "forward": "Logits of the reference forward pass, a layer at a time.",
    "fingerprint": "Record what a checkpoint says on fixed prompts, in a few kB.",
    "synth": "Make a seeded random checkpoint in the published format.",
}
"""Name -> one-line help. The command lives in the file of that name."""

ENOUGH_FILES = 1 << 16

QUIET_TYPER: dict[str, Any] = {
    "rich_markup_mode": None,
    "add_completion": False,
    "pretty_exceptions_enable": False,
}
"""Plain help texts: rich costs start-up time and boxes. Errors are told by ``failure``."""


class Commands(TyperGroup):
    """The commands of the table, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None."""
        if cmd_name not in COMMANDS:
            return None
        hush(cmd_name)
        try:
            module = import_module(f"dsv4_quant.cli.{cmd_name}")
        except Exception as error:
            raise typer.Exit(report(error, debug="--debug" in sys.argv)) from None
        alone = typer.Typer(**QUIET_TYPER)
        alone.command(cmd_name)(guarded(module.command, cmd_name))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in ``--help``, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(cls=Commands, no_args_is_help=True, **QUIET_TYPER)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"dsv4-quant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Convert, requantise, prove, repack and verify DeepSeek-V4 checkpoints.

    Several processes, on one machine or many, share the work of convert, repack, verify, digest and
    fingerprint where torchrun or srun starts them; paths must lie on a filesystem that they share.

    \b
      torchrun --nproc-per-node 4 -m dsv4_quant convert SRC OUT --gpus 8

    \b
    Exit codes: 0 done, or all checks hold; 1 a check found something;
    2 wrong usage or unreadable input.
    """


def _allow_many_files() -> None:
    """As many open files as the system lets us have: every shard and every output file is one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if most == resource.RLIM_INFINITY else min(most, ENOUGH_FILES)
    if now < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def main() -> None:
    """Runs the command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    _allow_many_files()
    gc.set_threshold(200_000, 20, 20)  # headers are a million objects that live: don't walk them
    try:
        app(prog_name="dsv4-quant")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # pressed twice: the second must not change how this ends
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
