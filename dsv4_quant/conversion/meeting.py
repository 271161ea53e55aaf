"""The processes of a run meet in the workspace, which must be one and the same folder for all."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from dsv4_quant.conversion.journal import FOLDER, Workspace
from dsv4_quant.errors import TeamError
from dsv4_quant.team import Team

SEEING = 30.0
"""Seconds that a network filesystem may take to show what another machine has written."""


def meet(team: Team, out: Path) -> Workspace:
    """The workspace of all processes. Raises TeamError where one sees another folder as OUT.

    Raises BusyError when another run is at work there.
    """
    opened: list[Workspace] = []
    try:
        sign = team.lead(lambda: _open(opened, out, alone=team.size == 1))
        team.gather(lambda: None if opened else opened.append(_join(team.rank, out, sign)))
        team.lead(lambda: (out / FOLDER / sign).unlink() if sign else None)
    except BaseException:
        for work in opened:
            if team.is_first and not work.parts:
                work.discard()
            work.close()
        raise
    return opened[0]


def _open(opened: list[Workspace], out: Path, *, alone: bool) -> str:
    """The first process opens it, and leaves a sign for the others to see."""
    work = Workspace(out)
    opened.append(work)
    if alone:
        return ""
    work.share()
    sign = f"sign-{secrets.token_hex(8)}"
    (work.folder / sign).touch()
    return sign


def _join(rank: int, out: Path, sign: str) -> Workspace:
    deadline = time.monotonic() + SEEING
    while not (out / FOLDER / sign).exists():
        if time.monotonic() > deadline:
            raise TeamError(
                f"Process {rank} does not see in OUT what process 0 has written there",
                file=out.absolute(),
                hint="OUT must be one folder for all processes, on a filesystem that they share.",
            )
        time.sleep(0.05)
    return Workspace(out, join=True)
