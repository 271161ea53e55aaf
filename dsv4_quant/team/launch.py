"""What the launcher said of this process: torchrun in RANK and WORLD_SIZE, srun in SLURM_*."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_quant.errors import UsageError

PORTS = range(10_000, 30_000)
"""Below those that a kernel gives away by itself. A SLURM step takes one by its number."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among its like, and where they meet."""

    rank: int
    size: int
    host: str
    port: int
    is_served: bool = False
    """The launcher keeps a board there already; else the first process does."""
    attempt: str = "0"
    """torchrun may start all processes again, with the same board."""
    local: int | None = None
    """Which process of its machine this is, if the launcher says."""


def launched(environ: Mapping[str, str]) -> Launch | None:
    """None for a process that works alone. Raises UsageError where the variables make no sense.

    SLURM's are believed inside a step only: a plain command in a batch script has SLURM_NTASKS,
    too, and nobody else would come.
    """
    if "WORLD_SIZE" in environ:
        return _by_torchrun(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _by_slurm(environ)
    return None


def _by_torchrun(environ: Mapping[str, str]) -> Launch | None:
    if _number(environ, "WORLD_SIZE") == 1:
        return None
    return _checked(
        Launch(
            rank=_number(environ, "RANK"),
            size=_number(environ, "WORLD_SIZE"),
            host=_text(environ, "MASTER_ADDR"),
            port=_number(environ, "MASTER_PORT"),
            is_served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            local=_number(environ, "LOCAL_RANK") if environ.get("LOCAL_RANK") else None,
        )
    )


def _by_slurm(environ: Mapping[str, str]) -> Launch | None:
    if _number(environ, "SLURM_STEP_NUM_TASKS") == 1:
        return None
    job, step = (_number(environ, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = PORTS[(job + 7919 * step) % len(PORTS)]  # steps of a job run side by side
    return _checked(
        Launch(
            rank=_number(environ, "SLURM_PROCID"),
            size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            host=environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
            port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else port,
            local=_number(environ, "SLURM_LOCALID") if environ.get("SLURM_LOCALID") else None,
        )
    )


def first_host(nodes: str) -> str:
    """``node01`` of SLURM's ``node[01-04,7],login1``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma outside of brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _checked(launch: Launch) -> Launch:
    if not (0 <= launch.rank < launch.size and 0 < launch.port < 1 << 16):
        raise UsageError(
            f"The environment says process {launch.rank} of {launch.size}, port {launch.port}",
            hint="Let torchrun or srun set RANK, WORLD_SIZE and MASTER_PORT.",
        )
    return launch


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UsageError(
            f"This is one of several processes by its environment, but {name} is not set",
            hint="Start them with torchrun or srun. To work alone, unset WORLD_SIZE.",
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"The environment variable {name} is no number: {text!r}")
    return int(text)
