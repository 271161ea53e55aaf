"""Ranges of files through connections that break, hubs that are busy, and files that change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dsv4_quant.errors import Dsv4Error, SourceChangedError, UnreadableError, UsageError
from dsv4_quant.hub import connection as module
from dsv4_quant.hub.connection import Connection, Interrupted
from dsv4_quant.hub.repository import RemoteFile
from tests.hub.conftest import Weather, connect
from tests.hub_server import Cut, Hub, Refuse, Send, Trouble

SHARD = "model-00002-of-00003.safetensors"


def shard(connection: Connection) -> RemoteFile:
    return connection.repository.weights[SHARD]


def fetch(connection: Connection, start: int = 0, stop: int | None = None) -> bytes:
    file = shard(connection)
    return b"".join(connection.stream(file, start, file.size if stop is None else stop))


def troubles(*found: Trouble) -> Callable[[str, int, int], Trouble]:
    """One after the other, then none."""
    left = list(found)
    return lambda name, start, stop: left.pop(0) if left else None


def test_any_range(hub: Hub) -> None:
    data, connection = hub.files()[SHARD], connect(hub)
    for start, stop in [(0, len(data)), (0, 1), (5, 5), (7, 100_000), (len(data) - 1, len(data))]:
        assert fetch(connection, start, stop) == data[start:stop]
    assert hub.ranges[1] == f"{SHARD} bytes=0-0" and len(hub.ranges) == 4  # none for nothing


def test_a_broken_connection_is_taken_up_at_its_byte(hub: Hub) -> None:
    data, connection = hub.files()[SHARD], connect(hub)
    hub.trouble = troubles(Cut(100_000), Cut(0), Cut(1), Cut(500_000))
    assert fetch(connection, 10) == data[10:]
    starts = [int(said.split("=")[1].split("-")[0]) for said in hub.ranges]
    assert starts == [10, 100_010, 100_010, 100_011, 600_011]
    assert hub.sent[SHARD] == len(data) - 10  # not a byte twice


def test_bad_weather(hub: Hub) -> None:
    data, connection = hub.files()[SHARD], connect(hub)
    hub.trouble = weather = Weather(1)
    for start in range(0, len(data), 100_000):
        stop = min(start + 100_000, len(data))
        assert fetch(connection, start, stop) == data[start:stop]
    assert weather.cuts > 3 and weather.refusals > 3


@pytest.mark.parametrize(
    "trouble", [Refuse(429, "1"), Refuse(429, '"resolvers";r=0;t=1', "RateLimit")]
)
def test_the_hub_says_how_long_to_wait(hub: Hub, trouble: Trouble) -> None:
    connection = connect(hub, pause=100)
    hub.trouble = troubles(trouble)
    began = time.monotonic()
    fetch(connection, 0, 10)
    assert 1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("trouble", [Refuse(503, None), Refuse(429, "nonsense"), Cut(0)])
def test_a_hub_that_gives_nothing_is_given_up(hub: Hub, trouble: Trouble) -> None:
    connection = connect(hub, pause=0.0001)
    hub.trouble = lambda name, start, stop: trouble
    with pytest.raises(UnreadableError, match="Run the same command again"):
        fetch(connection)
    assert hub.asked[SHARD] == module.FRUITLESS


def test_a_hub_that_gives_a_little_each_time_is_not(hub: Hub) -> None:
    connection = connect(hub, pause=0.0001)
    hub.trouble = lambda name, start, stop: Cut(4_000)
    assert fetch(connection, 0, 100_000) == hub.files()[SHARD][:100_000]
    assert hub.asked[SHARD] == 25


def test_pauses_double(hub: Hub) -> None:
    connection = connect(hub, pause=0.05)
    hub.trouble = troubles(*[Refuse(503, None)] * 4)
    began = time.monotonic()
    fetch(connection, 0, 10)
    assert 0.05 * (1 + 2 + 4 + 8) <= time.monotonic() - began < 5


def change_commit(hub: Hub) -> None:
    hub.commit = "5" * 40


def change_hash(hub: Hub) -> None:
    hub.etags[SHARD] = "5" * 64


def change_size(hub: Hub) -> None:
    path = hub.root / SHARD
    hub.etags[SHARD] = connect(hub).repository.weights[SHARD].hash
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("change", [change_commit, change_hash, change_size])
def test_a_file_that_changes_is_an_error(hub: Hub, change: Callable[[Hub], None]) -> None:
    connection = connect(hub)
    fetch(connection, 0, 10)
    change(hub)
    with pytest.raises(SourceChangedError, match="changed") as caught:
        fetch(connection, 10, 20)
    assert f"someone/tiny/{SHARD}" in str(caught.value)
    assert len(hub.ranges) == 2  # it is not asked again


def test_a_file_or_repository_that_is_gone(hub: Hub) -> None:
    connection = connect(hub)
    (hub.root / SHARD).unlink()
    with pytest.raises(UnreadableError, match="someone/tiny failed"):
        fetch(connection)
    hub.repo = "someone/else"
    with pytest.raises(UsageError, match="no someone/tiny that you may see"):
        fetch(connection)


def test_more_than_was_asked_for_is_not_taken(hub: Hub) -> None:
    hub.trouble = lambda name, start, stop: Send(bytes(100_000))
    assert fetch(connect(hub), 5, 10) == bytes(5)


@pytest.mark.parametrize("trouble", [Refuse(503, "600"), Cut(3)])
def test_a_halt_ends_all_waiting(hub: Hub, trouble: Trouble) -> None:
    connection = connect(hub, pause=60)
    hub.trouble = lambda name, start, stop: trouble
    timer = threading.Timer(0.3, connection.halt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        fetch(connection)
    assert time.monotonic() - began < 5
    timer.join()


def test_no_network(hub: Hub) -> None:
    connection = connect(hub, pause=0.0001)
    object.__setattr__(connection.repository, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(Dsv4Error, match="failed"):
        fetch(connection)
