"""Progress: lines for logs, a bar for terminals, nothing for --quiet."""

from __future__ import annotations

import io
import threading

import pytest

from dsv4_quant.cli.progress import Bar, Lines, shown
from dsv4_quant.progress import NoProgress, Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_at_the_start_the_end_and_every_five_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines.stage("copying")
    lines.total(100 << 20)
    for _ in range(20):
        clock.now += 1
        lines.advance(5 << 20)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "copying ...",
        "copying: 25.0 MiB of 100 MiB (25 %), 5.00 MiB/s, 15 s left",
        "copying: 50.0 MiB of 100 MiB (50 %), 5.00 MiB/s, 10 s left",
        "copying: 75.0 MiB of 100 MiB (75 %), 5.00 MiB/s, 5 s left",
        "copying: 100 MiB of 100 MiB (100 %), 5.00 MiB/s",
        "copying: 100 MiB in 20 s",
    ]


def test_a_note_is_a_line_of_its_own() -> None:
    stream = io.StringIO()
    lines = Lines(stream, Clock())
    lines.stage("forward pass", "steps")
    lines.note("the GPU sleeps")
    lines.advance(1)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "forward pass ...", "the GPU sleeps", "forward pass: 1 steps in 0 s",
    ]  # fmt: skip
    bar = Bar(stream := io.StringIO())
    bar.stage("forward pass", "steps")
    bar.note("the GPU sleeps")
    bar.close()
    assert "the GPU sleeps" in stream.getvalue().splitlines()


def test_stages_follow_each_other() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines.stage("planning")
    lines.stage("writing")
    lines.total(10)
    lines.advance(10)
    lines.stage("checking")
    lines.close()
    assert stream.getvalue().splitlines() == [
        "planning ...",
        "writing ...",
        "writing: 10 B in 0 s",
        "checking ...",
    ]


def test_a_stage_of_unknown_size() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines.stage("reading")
    clock.now += 6
    lines.advance(6 << 10)
    assert stream.getvalue().splitlines()[-1] == "reading: 6.00 KiB, 1.00 KiB/s"


def test_bar_shows_bytes_and_rate() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.stage("copying")
    bar.total(2 << 20)
    bar.advance(1 << 20)
    bar.advance(1 << 20)
    bar.close()
    last = stream.getvalue().split("\r")[-1]
    assert "copying: 100%" in last and "2.00M/2.00M" in last and "B/s" in last


def test_a_bar_needs_no_stage() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar.advance(1)
    bar.total(4)
    bar.advance(4)
    bar.close()
    bar.close()
    assert "working: 100%" in stream.getvalue()


@pytest.mark.parametrize("kind", [Bar, Lines])
def test_threads_lose_no_byte(kind: type[Bar] | type[Lines]) -> None:
    stream = io.StringIO()
    progress = kind(stream)
    progress.stage("work")
    progress.total(4 * 2000)
    threads = [
        threading.Thread(target=lambda: [progress.advance(1) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.close()
    assert ("7.81k/7.81k" if kind is Bar else "work: 7.81 KiB in") in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("quiet", "stream", "kind"),
    [
        (True, Terminal(), NoProgress),
        (False, Terminal(), Bar),
        (False, io.StringIO(), Lines),
    ],
)
def test_who_is_shown_what(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, stream: io.StringIO, kind: type[Progress]
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    with shown(quiet=quiet) as progress:
        assert type(progress) is kind
        progress.stage("work")
        progress.total(10)
        progress.advance(10)
    assert ("work" in stream.getvalue()) is not quiet
