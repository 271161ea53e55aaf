"""Runs conversions in children that can be made to fail at any call to the system.

A job comes as one JSON object per line on stdin, its outcome goes as one line to stdout. Each job
runs in a fork of this process, so that imports and compiled kernels are paid once; a job with
``here`` runs in the process itself, and warms them. A job's fault names a call
(one of CALLS), which of them (the first is 0; ``lasting``: all from there on), and what happens
instead of it:

kill       SIGKILL
power      the same, but what no sync has made durable is lost first: written ranges become zeros
           or noise, a file that was not synced is cut, the last renames are undone
interrupt  SIGINT
vanish     the file ``path`` is removed, and the call goes on
rewrite    the file ``path`` gets the content of ``by`` (in place, times and all), likewise
EIO ...    the call fails with that error
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_quant.conversion import budget, plan, stream
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.errors import Dsv4Error

CALLS = ("pwritev", "fdatasync", "fsync", "replace", "unlink", "mkdir", "rmdir", "write",
         "ftruncate")  # fmt: skip


class Faults:
    """Stands between the converter and the system, and keeps a list of what was called."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault = fault
        self.calls: list[str] = []
        self.lock = threading.RLock()
        self.unsynced: dict[str, list[tuple[int, int]]] = {}
        self.renames: list[tuple[str, str, str | None]] = []
        self.synced: dict[str, int] = {}
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> Faults:
        for name in CALLS:
            setattr(os, name, self.standing_for(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.real.items():
            setattr(os, name, call)

    def standing_for(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                number = self.calls.count(name)
                self.calls.append(name)
                if name == self.fault.get("call") and (
                    number == self.fault["nth"]
                    or (number > self.fault["nth"] and self.fault.get("lasting"))
                ):
                    self.strike(name, args)
                self.before(name, args)
            result = self.real[name](*args, **kwargs)
            with self.lock:
                self.after(name, args)
            return result

        return call

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "pwritev":
            length = sum(len(part) for part in args[1])
            self.unsynced.setdefault(path_of(args[0]), []).append((args[2], length))
        if name == "fdatasync":  # what comes later is not covered
            self.unsynced[f"syncing {threading.get_ident()}"] = self.unsynced.pop(
                path_of(args[0]), []
            )
        if name == "replace" and self.fault.get("action") == "power":
            source, target = map(str, args[:2])
            backup = None
            if Path(target).exists():
                backup = f"{self.fault['aside']}/{len(self.calls)}"
                os.link(target, backup)
            self.renames.append((source, target, backup))

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "fdatasync":
            self.unsynced.pop(f"syncing {threading.get_ident()}", None)
        if name == "fsync" and Path(path_of(args[0])).is_file():  # appended to, it keeps so much
            self.synced[path_of(args[0])] = os.fstat(args[0]).st_size
        if name == "replace" and str(args[0]) in self.synced:
            self.synced[str(args[1])] = self.synced.pop(str(args[0]))
        if name == "fsync" and Path(path_of(args[0])).is_dir():
            folder = path_of(args[0])
            self.renames = [r for r in self.renames if str(Path(r[1]).parent) != folder]

    def strike(self, name: str, args: tuple[Any, ...]) -> None:
        action = self.fault["action"]
        if action in ("vanish", "rewrite"):
            self.change_source(action)
        elif action == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif action in ("kill", "power"):
            if action == "power":
                self.lose(name, args)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        else:
            number = getattr(errno, action)
            raise OSError(number, os.strerror(number))

    def change_source(self, action: str) -> None:
        path = Path(self.fault["path"])
        if action == "vanish":
            self.real["unlink"](path)
            return
        with path.open("r+b") as file:
            file.write(Path(self.fault["by"]).read_bytes())

    def lose(self, name: str, args: tuple[Any, ...]) -> None:
        chance = random.Random(self.fault["nth"])
        for path, ranges in self.unsynced.items():
            if not Path(path).is_file():
                continue
            with Path(path).open("r+b") as file:
                for offset, length in ranges:
                    file.seek(offset)
                    fate = chance.choice(["kept", "zeros", "noise"])
                    if fate != "kept":
                        file.write(bytes(length) if fate == "zeros" else chance.randbytes(length))
        if name == "fsync" and Path(path_of(args[0])).is_file():
            path = path_of(args[0])
            os.truncate(path, chance.randint(self.synced.get(path, 0), Path(path).stat().st_size))
        for _ in range(chance.randrange(len(self.renames) + 1)):
            source, target, backup = self.renames.pop()
            Path(source).parent.mkdir(parents=True, exist_ok=True)
            Path(target).rename(source)
            if backup:
                Path(backup).rename(target)


def path_of(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """One conversion in this process."""
    plan.cuts.__defaults__, stream.BATCH_BYTES = (job["cut"],), 1 << 14
    budget.PANEL_VALUES = budget.LEAST_VALUES = 1 << 16
    with Faults(job.get("fault", {})) as faults:
        try:
            report = convert(
                job["src"],
                job["out"],
                Request(*job["request"]),
                workers=2,
                overwrite=job.get("overwrite", False),
                move=job.get("move", False),
            )
            outcome: dict[str, Any] = {"resumed": report.resumed_bytes, "bytes": report.bytes}
        except (Dsv4Error, KeyboardInterrupt) as error:
            outcome = {"error": type(error).__name__, "text": str(error)}
    return {**outcome, "calls": faults.calls}


def child(job: dict[str, Any], pipe: int) -> None:
    """Never returns."""
    try:
        answer = json.dumps(perform(job)).encode()
    except BaseException as error:
        answer = json.dumps({"error": "crash", "text": repr(error)}).encode()
    with os.fdopen(pipe, "wb") as file:
        file.write(answer)
    os._exit(0)


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Forks a child for a job and waits for it; kills it after ``job["seconds"]`` if given."""
    if job.get("here"):
        with tempfile.TemporaryDirectory() as folder:  # a first use of kernels has calls of its own
            perform({**job, "out": f"{folder}/warm", "move": False})
        return perform(job)
    aside = Path(job["out"]).parent / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    job.setdefault("fault", {})["aside"] = str(aside)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        child(job, writing)
    os.close(writing)
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(pid, signal.SIGKILL)
    timer = threading.Timer(30, os.kill, (pid, signal.SIGABRT))
    timer.start()
    with os.fdopen(reading, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    timer.cancel()
    timer.join()
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    found: dict[str, Any] = json.loads(answer)
    return found


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(supervise(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
