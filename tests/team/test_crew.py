"""Processes as threads at a board in memory: what they bring together, and how they end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_quant.errors import NotANumberError, TeamError, WriteError
from dsv4_quant.progress import NoProgress
from dsv4_quant.team import Team, crew, join, watch
from dsv4_quant.team.crew import Crew
from tests.team.boards import MemoryBoard, all_of, member


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "BEAT", 0.02)


class Shown(NoProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.done = self.of = 0

    def total(self, count: int) -> None:
        self.of = count

    def note(self, text: str) -> None:
        self.noted = text

    def advance(self, count: int) -> None:
        self.done += count


def test_alone() -> None:
    team, said = join({}), []
    assert type(team) is Team and team.is_first and (team.size, team.sharing) == (1, 1)
    assert team.local == 0
    assert team.gather(lambda: 3) == [3] and team.lead(lambda: 4) == 4
    team.agree(lambda: "one", "thing")
    team.tell(lambda: said.append("it"))
    team.close()
    assert said == ["it"] and isinstance(team.watched(None), NoProgress)


def test_which_of_its_machine_a_process_is() -> None:
    """The launcher's word; without it the rank."""
    assert all_of(3, lambda team: team.local) == [0, 1, 2]
    assert all_of(3, lambda team: team.local, locals_=[0, 1, 0]) == [0, 1, 0]


def test_the_launcher_s_word_reaches_the_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr("dsv4_quant.team.board_torch.connect", lambda *_: None)
    monkeypatch.setattr(crew, "Crew", lambda *args, local: made.append((*args, local)))
    environ = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    join({**environ, "LOCAL_RANK": "1"})
    join(environ)
    assert made == [(5, 8, None, 1), (5, 8, None, None)]


@pytest.mark.parametrize("size", [2, 5])
def test_what_all_do_comes_to_the_first(size: int) -> None:
    def program(team: Crew) -> object:
        parts = team.gather(lambda: np.full(3, team.rank))
        return team.lead(lambda: [part.tolist() for part in parts]), len(parts)

    every = [[rank] * 3 for rank in range(size)]
    assert all_of(size, program) == [(every, size)] + [(every, 0)] * (size - 1)


def test_large_values_travel_in_pieces() -> None:
    board, large = MemoryBoard(), bytes(range(256)) * (10 << 12)  # 10 MiB; a board takes 8
    found = all_of(2, lambda team: team.lead(lambda: large) == large, board)
    assert found == [True, True]
    found = all_of(2, lambda team: team.gather(lambda: large), board := MemoryBoard())
    assert found == [[large, large], []]
    assert sum(map(len, board.held.values())) < 10_000, "what was gathered is forgotten"


def test_an_error_of_one_ends_all_with_the_same() -> None:
    said: list[int] = []

    def program(team: Crew) -> None:
        def work() -> None:
            progress = team.watched(None)
            if team.rank == 2:
                raise NotANumberError("A NaN", tensor="embed.weight", file=Path("x"), hint="Fetch.")
            for _ in range(2000):
                progress.advance(1)
                time.sleep(0.005)

        try:
            team.gather(work)
        finally:
            team.tell(lambda: said.append(team.rank))

    began = time.monotonic()
    found = all_of(4, program)
    assert time.monotonic() - began < 3
    wanted = "A NaN. (file x, tensor embed.weight) Fetch."
    assert [type(error) for error in found] == [NotANumberError] * 4
    assert [str(error) for error in found] == [wanted] * 4
    assert [error.tensor for error in found] == ["embed.weight"] * 4
    assert said == [0]


def test_of_several_errors_all_end_with_one() -> None:
    def program(team: Crew) -> None:
        team.gather(lambda: (_ for _ in ()).throw(WriteError(f"Of {team.rank}")))

    found = all_of(4, program)
    assert len({str(error) for error in found}) == 1 and isinstance(found[0], WriteError)


def test_the_first_waits_until_nobody_works_any_more() -> None:
    working, ended = threading.Semaphore(0), list[bool]()

    def program(team: Crew) -> None:
        def work() -> None:
            if team.rank == 0:
                raise WriteError("Full")
            time.sleep(0.3)
            working.release()

        try:
            team.gather(work)
        except WriteError:
            if team.rank == 0:
                ended.extend(working.acquire(blocking=False) for _ in range(2))
            raise

    assert [str(error) for error in all_of(3, program)] == ["Full."] * 3
    assert ended == [True, True], "both had ended their work by then"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "I/O error"), MemoryError()])
def test_python_errors_travel(error: BaseException) -> None:
    found = all_of(2, lambda team: team.gather(lambda: team.rank and exec_raise(error)))
    assert [type(one) for one in found] == [type(error)] * 2
    assert [one.args for one in found] == [error.args] * 2


def exec_raise(error: BaseException) -> None:
    raise error


def test_an_error_that_cannot_travel_keeps_its_words() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    first, _ = all_of(2, lambda team: team.gather(lambda: team.rank and exec_raise(Odd(1, 2))))
    assert isinstance(first, RuntimeError) and str(first) == "Odd: 1 and 2"


def test_who_disagrees_is_named() -> None:
    found = all_of(3, lambda team: team.agree(lambda: "ab"[team.rank == 2], "source"))
    assert {type(error) for error in found} == {TeamError}
    assert "Process 2 sees another source than process 0" in str(found[1])
    assert all_of(3, lambda team: team.agree(lambda: "a", "source")) == [None] * 3


def test_progress_is_the_sum_of_all() -> None:
    shown = Shown()

    def program(team: Crew) -> None:
        progress = team.watched(shown if team.rank == 0 else None)
        team.lead(lambda: progress.stage("planning") or progress.advance(1000))
        progress.stage("hashing")
        progress.total(10 * (team.rank + 1))
        progress.advance(3 * (team.rank + 1))
        progress.note(f"from {team.rank}")
        time.sleep(0.3)
        team.gather(lambda: None)

    assert all_of(3, program) == [None] * 3
    assert (shown.done - 1000, shown.of, shown.noted) == (18, 60, "from 0")


class TestALostProcess:
    @pytest.mark.parametrize("lost", [0, 1, 3])
    def test_that_is_far_away(self, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its heartbeat stops. When it is the first, the board may go with it or stay."""
        monkeypatch.setattr(watch, "SILENCE", 0.3)
        monkeypatch.setattr(crew, "LEAVING", 0.5)
        monkeypatch.setattr(crew, "STOPPING", 0.5)
        said: list[int] = []
        board = MemoryBoard()

        def program(team: Crew) -> None:
            team.gather(lambda: None)  # all have come

            def work() -> None:
                if team.rank == lost:
                    team._closing.set()  # it says nothing any more
                    board.gone = lost == 0
                    time.sleep(1)
                    raise SystemExit
                while True:
                    team.check()
                    time.sleep(0.01)

            try:
                team.gather(work)
            except TeamError:
                team.tell(lambda: said.append(team.rank))
                raise

        found = all_of(4, program, board)
        others = [error for rank, error in enumerate(found) if rank != lost]
        assert [type(error) for error in others] == [TeamError] * 3
        assert f"Process {lost} of 4, on host, has ended" in str(others[0])
        assert said == [1 if lost == 0 else 0]

    def test_that_leaves_without_its_part(self) -> None:
        found = all_of(2, lambda team: team.gather(lambda: 1) if team.rank == 0 else None)
        assert isinstance(found[0], TeamError) and "Process 1 of 2" in str(found[0])

    def test_that_never_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(crew, "JOINING", 0.1)
        with pytest.raises(TeamError, match=r"Of 3 processes 2 did not come.*process 1"):
            Crew(0, 3, MemoryBoard(), member=member())


class TestABrokenNetwork:
    """Questions are swallowed: no error, no answer."""

    @pytest.mark.parametrize("who", ["the thread that looks around", "the one that works"])
    def test_who_gets_no_answer_ends(self, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(crew, "SILENCE", 0.3)
        monkeypatch.setattr(crew, "LEAVING", 0.1)
        ended: list[tuple[int, int]] = []
        board, mended = MemoryBoard(), threading.Event()

        class Line:
            """One process's way to the board."""

            is_cut = False

            def __getattr__(self, name: str) -> Any:
                if self.is_cut and (name == "set") == (who == "the thread that looks around"):
                    assert mended.wait(10)
                return getattr(board, name)

        def end(*whom: int) -> None:
            ended.append(whom)
            mended.set()

        monkeypatch.setattr(crew, "_end_cut_off", end)
        line = Line()

        def program(team: Crew) -> object:
            if team.rank == 0:
                return team.lead(lambda: mended.wait(10))
            line.is_cut = True
            began = time.monotonic()
            found = team.lead(lambda: None)
            return found, time.monotonic() - began

        found: list[Any] = [None, None]

        def run(rank: int, way: Any) -> None:
            team = Crew(rank, 2, way, member=member(pid=rank))
            found[rank] = program(team)
            team.close()

        threads = [
            threading.Thread(target=run, args=each, daemon=True) for each in ((0, board), (1, line))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert ended == [(1, 2)] and found[0] is True
        assert found[1][0] is True and 0.3 < found[1][1] < 5

    def test_who_waits_for_others_is_answered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However long they take: only a question without an answer counts."""
        monkeypatch.setattr(crew, "SILENCE", 0.2)
        monkeypatch.setattr(crew, "_end_cut_off", lambda *whom: pytest.fail("ended"))
        assert all_of(2, lambda team: team.lead(lambda: time.sleep(0.8))) == [None, None]

    def test_it_ends_at_once_and_says_why(self) -> None:
        program = """
import sys, threading
threading.Thread(target=threading.Event().wait).start()
sys.stderr = open("/dev/null", "w")
from dsv4_quant.team.crew import _end_cut_off
_end_cut_off(1, 2)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: Process 1 of 2 has had no answer from the others")


def test_who_shares_cores() -> None:
    members = [member("a", 0, (0, 1)), member("a", 1, (1, 2)), member("a", 2, (3,)), member("b", 3)]
    assert all_of(4, lambda team: team.sharing, members=members) == [2, 2, 1, 1]
