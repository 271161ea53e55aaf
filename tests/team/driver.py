"""Runs commands in several processes that share them; any can be made to fail at a system call.

A job comes as one JSON object per line on stdin, its outcome goes as one line to stdout. Processes
are forks of this one, so that PyTorch and the compiled kernels are paid for once. A job has:

size       how many processes; with 0 the command runs in this one, and warms the kernels
argv       the command
faults     rank -> a fault as ``crash_driver`` takes them
killed     a rank that is killed as soon as the first process has said some words on stderr
folders    rank -> its working directory, where it is not the job's ``folder``
patches    names of constants -> values
cut        bytes between two cuts of the journal; panels are small then, too
"""

from __future__ import annotations

import importlib
import io
import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from dsv4_quant.cli.main import main as command_line
from dsv4_quant.cli.together import SHARED
from dsv4_quant.conversion import budget, plan, requantise, stream
from dsv4_quant.team import board_torch, crew
from tests.conversion.crash_driver import Faults

for command in SHARED:  # everything is loaded before the forks
    importlib.import_module(f"dsv4_quant.cli.{command}")
assert board_torch and requantise
TIMEOUT = 60


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def child(job: dict[str, Any], rank: int, place: dict[str, str]) -> None:
    """Never returns."""
    code: Any = 99
    try:
        os.environ |= {**place, "RANK": str(rank)}
        os.chdir(job.get("folders", {}).get(str(rank), job["folder"]))
        for number, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{job['folder']}/{rank}.{name}", flags), number)
        for name, value in job.get("patches", {}).items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        if "cut" in job:
            plan.cuts.__defaults__, stream.BATCH_BYTES = (job["cut"],), 1 << 14
            budget.PANEL_VALUES = budget.LEAST_VALUES = 1 << 16
        crew.BEAT = 0.1
        sys.argv = ["dsv4-quant", *job["argv"]]
        with Faults(job.get("faults", {}).get(str(rank), {})):
            command_line()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def warm(job: dict[str, Any]) -> dict[str, Any]:
    """The command in this process; threads that PyTorch would start do not survive a fork."""
    sys.argv, code = ["dsv4-quant", *job["argv"]], 0
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return {"out": [out.getvalue()], "err": [err.getvalue()], "codes": [code], "late": 0.0}


def strike(killed: dict[str, Any], pids: dict[int, int], err: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (err.exists() and killed["said"] in err.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(next(pid for pid, rank in pids.items() if rank == killed["rank"]), 9)


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Per process how it ended and what it wrote; and the time between the first end and the last.

    A code is negative for a signal. Alone it runs without the variables of a team.
    """
    size: int = job["size"]
    if not size:
        return warm(job)
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = {}
    for rank in range(size):
        if not (pid := os.fork()):
            child(job, rank, place if size > 1 else {})
        pids[pid] = rank
    timer = threading.Timer(TIMEOUT, lambda: [os.kill(pid, 6) for pid in pids])
    timer.start()
    if "killed" in job:
        strike(job["killed"], pids, Path(job["folder"], "0.err"))
    codes: dict[int, int] = {}
    ends: list[float] = []
    while pids:
        pid, status = os.wait()
        codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        ends.append(time.monotonic())
    timer.cancel()
    timer.join()
    read = {
        name: [Path(job["folder"], f"{rank}.{name}").read_text() for rank in range(size)]
        for name in ("out", "err")
    }
    return {**read, "codes": [codes[rank] for rank in range(size)], "late": ends[-1] - ends[0]}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(perform(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
