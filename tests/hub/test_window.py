"""What a reader may be using is neither written nor given back, whatever happens at that moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from dsv4_quant.hub.connection import Interrupted
from dsv4_quant.hub.landing import Landing
from dsv4_quant.hub.notes import Notes
from dsv4_quant.hub.repository import header_end
from dsv4_quant.hub.schedule import Range, Visit
from dsv4_quant.hub.window import SUFFIX, Window
from tests.hub.conftest import connect
from tests.hub_server import Hub, Refuse, Send, Trouble

SHARD = "model-00002-of-00003.safetensors"
EARLY = (500_000, 700_000)
"""Read by step 0; step 1 reads all of the file, step 2 the others."""


@contextmanager
def window_on(hub: Hub, folder: Path, room: int = 1 << 30, done: int = 0) -> Iterator[Window]:
    connection = connect(hub)
    files = connection.repository.weights
    visits = [Visit(SHARD, 0, 0, (EARLY,), False)]
    visits += [
        Visit(name, 1 if name == SHARD else 2, 1 if name == SHARD else 2, ((0, file.size),), True)
        for name, file in sorted(files.items(), key=lambda item: item[0] != SHARD)
    ]
    headers = {name: Range(name, 0, header_end((hub.root / name).read_bytes())) for name in files}
    folder.mkdir(exist_ok=True)
    notes = Notes(folder / "notes")
    with closing(Window(connection, folder, headers, visits, room, done, notes)) as window:
        yield window


def read(window: Window, start: int, stop: int, name: str = SHARD) -> bytes:
    out = bytearray(stop - start)
    window.read_into(name, start, memoryview(out))
    return bytes(out)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def how_it_ends(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def test_a_file_that_comes_wrong_does_not_touch_what_is_in_use(hub: Hub, tmp_path: Path) -> None:
    data = hub.files()[SHARD]
    seen: list[bytes] = []

    def lie_once(name: str, start: int, stop: int) -> Trouble:
        if name != SHARD or start or stop < len(data):
            return None
        with (tmp_path / "work" / (SHARD + SUFFIX)).open("rb") as file:
            file.seek(EARLY[0])
            seen.append(file.read(EARLY[1] - EARLY[0]))
        return Send(bytes(len(data))) if len(seen) == 1 else None

    hub.trouble = lie_once
    with window_on(hub, tmp_path / "work") as window:
        assert read(window, *EARLY) == data[slice(*EARLY)]
        assert read(window, 0, len(data)) == data
    assert seen == [data[slice(*EARLY)]] * 2  # before the lie, and after it


def test_nothing_is_given_back_under_a_reader(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hub.files()[SHARD]
    hub.trouble = lambda name, start, stop: None if start else Refuse(503, "600")  # no whole file
    inside, go_on = threading.Event(), threading.Event()
    real = Landing.read_into

    def slow(landing: Landing, offset: int, out: memoryview) -> None:
        inside.set()
        assert go_on.wait(30)
        real(landing, offset, out)

    found: list[bytes] = []
    ended: list[BaseException | None] = []
    with window_on(hub, tmp_path / "work") as window:
        read(window, *EARLY)
        monkeypatch.setattr(Landing, "read_into", slow)
        # as a step behind the first one may, while the file's own turn has not come
        reader = in_thread(lambda: found.append(read(window, *EARLY)))
        assert inside.wait(30)
        releaser = in_thread(lambda: window.release(1))
        releaser.join(0.3)
        assert releaser.is_alive()
        late = in_thread(lambda: ended.append(how_it_ends(lambda: read(window, *EARLY))))
        go_on.set()
        reader.join(30)
        releaser.join(30)
        assert found == [data[slice(*EARLY)]] and not releaser.is_alive()
        late.join(0.3)
        assert late.is_alive()  # it waits for the whole file: the early bytes are gone
        window.halt()
        late.join(30)
        assert isinstance(ended[0], Interrupted)


def test_room_for_one_visit_at_a_time(hub: Hub, tmp_path: Path) -> None:
    sizes = {name: len(data) for name, data in hub.files().items() if name.endswith("tensors")}
    room = max(sizes.values()) + 4096
    others = [name for name in sizes if name != SHARD]
    with window_on(hub, tmp_path / "work", room) as window:
        read(window, *EARLY)
        window.release(1)
        read(window, 0, sizes[SHARD])
        assert not set(others) & set(hub.sent)
        window.release(2)
        first, second = sorted(others)
        read(window, 0, sizes[first], first)
        assert second not in hub.sent
        window.release(3)  # though the last has not come yet
        with pytest.raises(RuntimeError, match="nobody expects it"):
            read(window, 0, 10, first)
        held = tmp_path / "work" / (second + SUFFIX)
        for _ in range(1000):
            if hub.sent[second] == sizes[second] and not held.stat().st_blocks:
                break
            time.sleep(0.01)
        else:
            pytest.fail("what came too late was kept")


def test_what_nobody_brings_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    with (
        window_on(hub, tmp_path / "work") as window,
        pytest.raises(RuntimeError, match="nobody expects it"),
    ):
        read(window, 0, 1 << 30)


def test_what_is_never_checked_is_never_confirmed(hub: Hub, tmp_path: Path) -> None:
    with window_on(hub, tmp_path / "work", 1 << 20) as window:
        read(window, *EARLY)
        with pytest.raises(RuntimeError, match="never checked"):
            window.confirm()


def test_what_has_served_goes_when_a_run_continues(hub: Hub, tmp_path: Path) -> None:
    work, held = tmp_path / "work", tmp_path / "work" / (SHARD + SUFFIX)
    with window_on(hub, work, 1 << 20) as window:
        read(window, *EARLY)
    assert held.stat().st_blocks * 512 >= EARLY[1] - EARLY[0]
    with window_on(hub, work, 1 << 20, done=1):
        assert held.stat().st_blocks * 512 <= 8192
    with window_on(hub, work, 1 << 20, done=3):
        assert not list(work.glob(f"*{SUFFIX}"))
