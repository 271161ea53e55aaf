"""Processes that meet at a board, and end together.

The first error of any process stands on the board. Each process looks there every half second,
and whenever it waits; it then stops what it is doing (``Watched``) and raises the same error.
"""

from __future__ import annotations

import os
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import repeat
from typing import Any, TypeVar

from dsv4_quant.errors import TeamError
from dsv4_quant.progress import NoProgress, Progress
from dsv4_quant.team.asked import AskedBoard
from dsv4_quant.team.board import Board, pack, pack_error, put, take, unpack
from dsv4_quant.team.launch import launched
from dsv4_quant.team.team import SAME_PATHS, Team
from dsv4_quant.team.watch import LEFT, SILENCE, Member, Watch
from dsv4_quant.team.watched import State, Watched

T = TypeVar("T")

BEAT = 0.5
"""Seconds between two looks at the board."""
JOINING = 300.0
"""Seconds that all processes have to come."""
STOPPING = 20.0
"""Seconds that the first process gives the others to stop when one has failed."""
TELLING = 30.0
"""Seconds after which another than the first process tells of a failure."""
LEAVING = 60.0
"""Seconds for which the first process keeps the board for the others."""

FAILED, TOLD, CLAIM = "failed", "told", "claim"


def join(environ: Mapping[str, str] = os.environ) -> Team:
    """The processes that torchrun or srun started with this one; a Team of one if none.

    Raises TeamError when they do not all come, UsageError when the variables make no sense.
    """
    launch = launched(environ)
    if launch is None:
        return Team()
    from dsv4_quant.team.board_torch import connect  # only here: it loads PyTorch

    board = connect(launch, JOINING)
    return Crew(launch.rank, launch.size, board, local=launch.local)


class Crew(Team):
    """One of several processes."""

    def __init__(
        self,
        rank: int,
        size: int,
        board: Board,
        *,
        member: Member | None = None,
        local: int | None = None,
    ) -> None:
        self.rank, self.size, self._board = rank, size, AskedBoard(board)
        self.local = rank if local is None else local
        self._others = [other for other in range(size) if other != rank]
        self._failure: BaseException | None = None
        self._rounds, self._beats, self._has_stopped = 0, 0, False
        self._shown = Watched(NoProgress(), self.check)
        self._states: dict[int, State] = {}
        self._members: dict[int, Member] = {}
        self._gone = threading.Event()
        threading.Thread(target=self._insist_on_answers, daemon=True).start()
        try:
            self._asked(lambda: self._meet(member or Member.here()))
        except BaseException:
            self._gone.set()
            raise
        mine = self._members[rank]
        self.sharing = sum(mine.shares_cores(other) for other in self._members.values())
        self._watch = Watch(rank, self._members)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look_around, daemon=True)
        self._thread.start()

    def _meet(self, mine: Member) -> None:
        """Returns when the last process has come."""
        self._beat()
        put(self._board, f"member/{self.rank}", mine)
        names = {rank: f"member/{rank}" for rank in range(self.size)}
        deadline = time.monotonic() + JOINING
        while not self._board.check(list(names.values())):
            if time.monotonic() > deadline:
                missing = [rank for rank, name in names.items() if not self._board.check([name])]
                raise TeamError(
                    f"Of {self.size} processes {len(missing)} did not come, the first of them is"
                    f" process {missing[0]}",
                    hint="Start them all; to work alone, unset WORLD_SIZE.",
                )
            time.sleep(0.02)
        self._members |= {rank: take(self._board, name) for rank, name in names.items()}

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Every process does its part: the first gets all results by rank, the others nothing."""
        mine, key = self._done(work), self._next()
        if not self.is_first:
            part = mine, self._shown.state()
            self._asked(lambda: put(self._board, f"{key}/{self.rank}", part))
            return []
        return [mine, *map(self._part_of, self._others, repeat(key))]

    def _part_of(self, rank: int, key: str) -> Any:
        part, self._states[rank] = self._awaited(f"{key}/{rank}", rank)
        self._shown.show(self._states.values())
        return part

    def lead(self, work: Callable[[], T]) -> T:
        """The first process does it, and all get its result."""
        key = self._next()
        if self.is_first:
            result = self._done(work)
            self._asked(lambda: put(self._board, key, result))
            return result
        found: T = self._awaited(key, 0)
        return found

    def agree(self, look: Callable[[], str], what: str, *, hint: str = SAME_PATHS) -> None:
        """Raises TeamError, which names the process, where one sees something else."""
        seen = self.gather(look)
        self.lead(lambda: _compare(seen, what, hint))

    def _next(self) -> str:
        self._rounds += 1
        return f"round/{self._rounds}"

    def _done(self, work: Callable[[], T]) -> T:
        try:
            self.check()
            result = work()
            self.check()
            return result
        except BaseException as error:
            raise self.fail(error) from None

    def _asked(self, question: Callable[[], T]) -> T:
        """What the board answers; it goes with the process that keeps it."""
        try:
            return question()
        except RuntimeError:
            if self._failure is None:
                self._failure = self._lost(0)
            raise self._failure from None

    def _awaited(self, key: str, rank: int) -> Any:
        """What another process puts there; what the first puts is for all."""
        pause = 0.001
        while not self._asked(lambda: self._board.check([key])):
            if self._failure is not None:
                raise self.fail(self._failure)
            has_left = self._asked(lambda: self._board.get(f"beat/{rank}")) == LEFT
            if has_left and not self._asked(lambda: self._board.check([key])):
                raise self.fail(self._lost(rank))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        return self._asked(lambda: take(self._board, key, forget=rank > 0))

    def watched(self, progress: Progress | None) -> Progress:
        """Shows the sum of all processes in the first."""
        if progress is self._shown:
            return progress
        self._shown = Watched(progress or NoProgress(), self.check)
        return self._shown

    def check(self) -> None:
        """Raises the error of any process, once it is known here."""
        if self._failure is not None:
            raise self._failure

    def fail(self, error: BaseException) -> BaseException:
        """Posts an error unless another came first. The first process then waits for the others,
        so that nobody writes any more when it cleans up."""
        if self._failure is None:
            self._post(error)
        assert self._failure is not None
        if not self._has_stopped:
            self._has_stopped = True
            with suppress(RuntimeError):
                self._board.set(f"stopped/{self.rank}", b"")
                if self.is_first:
                    self._wait_until(self._is_still, STOPPING)
        return self._failure

    def _is_still(self, rank: int) -> bool:
        board = self._board
        return board.check([f"stopped/{rank}"]) or board.get(f"beat/{rank}") == LEFT

    def _post(self, error: BaseException) -> None:
        mine = b64encode(pack_error(error))
        try:
            first = self._board.compare_set(FAILED, "", mine.decode())
        except RuntimeError:
            self._failure = self._lost(0)
            return
        self._failure = error if first == mine else unpack(b64decode(first))

    def tell(self, say: Callable[[], None]) -> None:
        """The first process tells; if it has not for long, whoever comes next."""
        try:
            if not self.is_first and self._wait_for_told():
                return
            if self._board.add(CLAIM, 1) == 1:
                say()
                self._board.set(TOLD, b"")
        except RuntimeError:  # the board is gone, and the first process with it
            if self.rank == 1:
                say()

    def _wait_for_told(self) -> bool:
        deadline = time.monotonic() + TELLING
        while not self._board.check([TOLD]):
            if time.monotonic() > deadline or 0 in self._watch.ended():
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Leaves; the first process is the last, because it may keep the board."""
        self._closing.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._board.set(f"beat/{self.rank}", LEFT)
            if self.is_first:
                self._wait_until(lambda rank: self._board.get(f"beat/{rank}") == LEFT, LEAVING)
        self._watch.close()
        self._gone.set()

    def _wait_until(self, is_so: Callable[[int], bool], seconds: float) -> None:
        """Until it is so of every other process that lives."""
        deadline, waiting = time.monotonic() + seconds, list(self._others)
        while waiting and time.monotonic() < deadline:
            ended = self._watch.ended()
            waiting = [rank for rank in waiting if rank not in ended and not is_so(rank)]
            time.sleep(0.01 if waiting else 0)

    def _beat(self) -> None:
        self._beats += 1
        self._board.set(f"beat/{self.rank}", pack((self._beats, *self._shown.state())))

    def _look_around(self) -> None:
        """The thread: says that this process lives, and looks after the others."""
        try:
            while not self._closing.wait(BEAT) and self._failure is None:
                self._beat()
                if self._board.check([FAILED]):
                    self._failure = unpack(b64decode(self._board.get(FAILED)))
                    return
                beats = self._read_beats()
                for rank in (*self._watch.ended(), *self._watch.silent(beats)):
                    if self._board.get(f"beat/{rank}") != LEFT:
                        self._post(self._lost(rank))
                        return
        except RuntimeError:
            if self._failure is None and not self._closing.is_set():
                self._failure = self._lost(0)

    def _insist_on_answers(self) -> None:
        """A thread: the others give up whom they do not hear for SILENCE, and may start again. So
        whoever is not answered for as long must not write any more."""
        while not self._gone.wait(BEAT):
            if self._board.owing() > SILENCE:
                _end_cut_off(self.rank, self.size)
                return

    def _read_beats(self) -> dict[int, bytes]:
        """Of all others in the first process; elsewhere of the first."""
        heard = self._others if self.is_first else [0]
        held = self._board.multi_get([f"beat/{other}" for other in heard])
        beats = dict(zip(heard, held, strict=True))
        if not self.is_first:
            return beats
        self._states |= {rank: unpack(b)[1:] for rank, b in beats.items() if b != LEFT}
        self._shown.show(self._states.values())
        return beats

    def _lost(self, rank: int) -> TeamError:
        where = f", on {self._members[rank].host}," if rank in self._members else ""
        return TeamError(
            f"Process {rank} of {self.size}{where} has ended without a word",
            hint="Was it killed, or did its memory run out? A conversion continues when the same"
            " command is run again, by any number of processes.",
        )


def _end_cut_off(rank: int, size: int) -> None:
    """Ends this process at once: its other threads may wait for what will never come."""
    said = (
        f"error: Process {rank} of {size} has had no answer from the others for {SILENCE:.0f}"
        " seconds, and ends. Is the network down? A conversion continues when the same command is"
        " run again.\n"
    )
    with suppress(OSError):
        os.write(2, said.encode())  # sys.stderr is silenced in all processes but the first
    os._exit(2)


def _compare(seen: list[str], what: str, hint: str) -> None:
    for rank, one in enumerate(seen):
        if one != seen[0]:
            raise TeamError(f"Process {rank} sees another {what} than process 0", hint=hint)
