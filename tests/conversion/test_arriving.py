"""Conversions straight from the hub: the same bytes, little disk, and no lie in an output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv4_quant.catalogue import shard_of
from dsv4_quant.checkpoint.header import DTYPE_ORDER
from dsv4_quant.checkpoint.reader import Checkpoint
from dsv4_quant.config import parse_config
from dsv4_quant.conversion import plan as plans
from dsv4_quant.conversion.journal import FOLDER
from dsv4_quant.conversion.notes import Cut as CutMade
from dsv4_quant.conversion.notes import Notes
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import ConvertReport, convert
from dsv4_quant.conversion.summary import plan_conversion
from dsv4_quant.errors import (
    NotANumberError,
    SourceChangedError,
    SourceDamagedError,
    UnreadableError,
    UsageError,
    WriteError,
)
from dsv4_quant.hub import opened
from dsv4_quant.hub.arrivals import NOTES
from dsv4_quant.hub.schedule import visits
from dsv4_quant.hub.window import SUFFIX
from tests.conversion.checkpoints import config, tree, write_checkpoint
from tests.folders import edited_file, read_file, write_file
from tests.hub.conftest import Weather
from tests.hub_server import Cut, Hub, Refuse, Send, Trouble, serving

CUT = 1 << 18
MP = Request("mp", 2)
LAYER = "model-00004-of-00009.safetensors"
"""The shard of layer 2."""


@pytest.fixture(autouse=True)
def _small_cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(plans.cuts, "__defaults__", (CUT,))
    yield
    close_session()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 16 experts, a shard each, its tensors grouped by dtype: 17 MB."""
    raw = config(num_hidden_layers=6, compress_ratios=[4, 128] * 3 + [0], hidden_size=256,
                 moe_intermediate_size=256, n_routed_experts=16)  # fmt: skip
    parsed = parse_config(raw)
    root = tmp_path_factory.mktemp("hub") / "src"
    write_checkpoint(root, raw, shard=lambda tensor: shard_of(tensor.spec, parsed))
    for path in root.glob("*.safetensors"):
        loose = sorted(read_file(path).items(), key=lambda t: (DTYPE_ORDER.index(t[1][0]), t[0]))
        write_file(path, dict(loose))
    (root / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def reference(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Request], dict[str, str]]:
    """What a conversion of the local folder gives."""
    made: dict[Request, dict[str, str]] = {}

    def tree_of(request: Request) -> dict[str, str]:
        if request not in made:
            out = tmp_path_factory.mktemp("local") / "out"
            convert(source, out, request, workers=2)
            made[request] = tree(out)
            shutil.rmtree(out)
        return made[request]

    return tree_of


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with serving(source) as hub:
        yield hub


def run(hub: Hub, out: Path, request: Request = MP, workers: int = 2) -> ConvertReport:
    """One conversion from the hub."""
    cache = out.parent / "cache"
    with opened(hub.repo, cache=cache, endpoint=hub.url, pause=0.001) as source:
        return convert(source.folder, out, request, workers=workers, arrivals=source.arrivals)


@contextmanager
def watched(out: Path) -> Iterator[list[int]]:
    """The disk space of what arrives, looked at again and again while the block runs."""
    seen, ended = [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            held = 0
            for path in (out / FOLDER).glob(f"*{SUFFIX}"):
                try:
                    held += path.stat().st_blocks * 512
                except FileNotFoundError:
                    continue
            seen.append(held)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in root.iterdir()}


def room_of(hub: Hub, place: Path, request: Request = MP) -> int:
    """What a dry run says of the disk, but for the output's part."""
    with opened(hub.repo, cache=place, endpoint=hub.url) as there:
        plan = plan_conversion(there.folder, place / "new", request, arrivals=there.arrivals)
    local = plan_conversion(hub.root, place / "new", request)
    return plan.disk_needed - local.disk_needed


REQUESTS = [MP, Request("mp", 2, "fp8"), Request("hf", 1, "keep", "bf16"), Request("hf", 1, "fp8")]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.layout}-{r.experts}-{r.dense}")
def test_the_same_bytes_within_the_promised_disk(
    request_: Request, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    room = room_of(hub, tmp_path, request_)
    weights = {name: size for name, size in sizes(source).items() if name.endswith(".safetensors")}
    assert 0 < room < 0.5 * sum(weights.values())

    hub.sent.clear()
    with watched(tmp_path / "out") as seen:
        run(hub, tmp_path / "out", request_)
    assert tree(tmp_path / "out") == reference(request_)
    assert 0.3 * room < max(seen) <= room
    with Checkpoint.open(source) as checkpoint:
        found = visits(plans.make_plan(checkpoint, request_).reads, weights)
    early = [span for visit in found if not visit.is_whole for span in visit.spans]
    assert bool(early) == (request_.layout == "mp")
    headers, parts = 9 * (256 << 10), sum(stop - start for start, stop in early)
    assert sum(hub.sent.values()) <= sum(sizes(source).values()) + parts + headers


def test_a_checkpoint_split_over_ranks(
    source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
) -> None:
    convert(source, tmp_path / "served", MP, workers=2)
    (tmp_path / "served" / "dsv4-manifest.json").unlink()  # it would name the other source
    request = Request("mp", 1, "fp8")
    convert(tmp_path / "served", tmp_path / "local", request, workers=2)
    with serving(tmp_path / "served") as hub:
        run(hub, tmp_path / "out", request)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_bad_weather(
    hub: Hub, reference: Callable[[Request], dict[str, str]], tmp_path: Path
) -> None:
    hub.trouble = weather = Weather(7)
    run(hub, tmp_path / "out")
    assert tree(tmp_path / "out") == reference(MP)
    assert weather.cuts > 10 and weather.refusals > 10


def is_whole(start: int, stop: int) -> bool:
    """Whether a request is for a file from front to back, not for a header or a range."""
    return start == 0 and stop > 1 << 20


def flipped(source: Path, name: str, start: int, stop: int, at: int) -> Send:
    data = bytearray((source / name).read_bytes()[start:stop])
    data[at] ^= 1
    return Send(bytes(data))


def finishes(hub: Hub, out: Path, reference: dict[str, str]) -> ConvertReport:
    """The same command with an honest hub in good weather."""
    hub.trouble = lambda name, start, stop: None
    report = run(hub, out)
    assert tree(out) == reference
    return report


class TestLies:
    def test_twice_is_an_error_and_nothing_is_made_of_them(
        self, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        def lie(name: str, start: int, stop: int) -> Trouble:
            if name == LAYER and is_whole(start, stop):
                return flipped(source, name, start, stop, 2_000_000)
            return None

        hub.trouble = lie
        with pytest.raises(SourceDamagedError) as caught:
            run(hub, tmp_path / "out")
        size, expected = published(hub)[LAYER]
        assert hub.ranges.count(f"{LAYER} bytes=0-{size - 1}") == 2
        text = str(caught.value)
        assert f"expected {expected}, found " in text and f"someone/tiny/{LAYER}" in text
        assert set(sizes(tmp_path / "out")) == {FOLDER}
        report = finishes(hub, tmp_path / "out", reference(MP))
        assert report.resumed_bytes > CUT  # what was made of other files is kept

    def test_once_is_forgiven(
        self, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        told: list[str] = []

        def lie(name: str, start: int, stop: int) -> Trouble:
            if is_whole(start, stop) and name not in told:
                told.append(name)
                return flipped(source, name, start, stop, stop - 1)
            return None

        hub.trouble = lie
        run(hub, tmp_path / "out")
        assert tree(tmp_path / "out") == reference(MP)
        assert len(told) > 5

    def test_about_what_was_used_before_the_whole_file_passed(
        self, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        def lie(name: str, start: int, stop: int) -> Trouble:
            if name == LAYER and start > 0:
                return flipped(source, name, start, stop, 0)  # the last bit of a number
            return None

        hub.trouble = lie
        with pytest.raises(SourceDamagedError, match="twice, and not the same") as caught:
            run(hub, tmp_path / "out")
        assert "begins anew" in str(caught.value)
        assert set(sizes(tmp_path / "out")) == {FOLDER}
        assert finishes(hub, tmp_path / "out", reference(MP)).resumed_bytes == 0

    def test_about_a_header(
        self, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        """Blank for blank: the same tensors in the same places."""
        head = (source / LAYER).read_bytes()[: 256 << 10].replace(b": [", b":[ ", 1)

        def lie(name: str, start: int, stop: int) -> Trouble:
            return Send(head) if name == LAYER and not is_whole(start, stop) and not start else None

        hub.trouble = lie
        with pytest.raises(SourceDamagedError, match=r"\[0, .*twice, and not the same"):
            run(hub, tmp_path / "out")
        finishes(hub, tmp_path / "out", reference(MP))

    def test_that_are_no_numbers(self, hub: Hub, tmp_path: Path) -> None:
        hub.trouble = lambda name, start, stop: Send(b"\xff" * (stop - start)) if (
            name == LAYER and start
        ) else None  # fmt: skip
        with pytest.raises(NotANumberError):
            run(hub, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def published(hub: Hub) -> dict[str, tuple[int, str]]:
    with opened(hub.repo, cache=hub.root.parent / "none", endpoint=hub.url) as source:
        assert source.arrivals is not None
        return {name: (int(size), str(sha)) for name, (size, sha) in source.arrivals.stamps.items()}


class TestAnotherRevision:
    @pytest.mark.parametrize("what", ["commit", "hash"])
    def test_while_it_is_fetched(
        self, what: str, hub: Hub, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        def change(name: str, start: int, stop: int) -> Trouble:
            if name == LAYER and is_whole(start, stop):
                if what == "commit":
                    hub.commit = "5" * 40
                else:
                    hub.etags[name] = "5" * 64
                return Cut(1_000_000)
            return None

        hub.trouble = change
        with pytest.raises(SourceChangedError, match="changed"):
            run(hub, tmp_path / "out")
        hub.etags.clear()
        assert finishes(hub, tmp_path / "out", reference(MP)).resumed_bytes  # the same hashes

    def test_between_two_runs(self, hub: Hub, source: Path, tmp_path: Path) -> None:
        """Other weights under the same names: nothing of the old ones may stay."""
        stop_at(hub, LAYER)
        with pytest.raises(UnreadableError):
            run(hub, tmp_path / "out")
        other = Path(shutil.copytree(source, tmp_path / "other"))
        with edited_file(other / "model-00002-of-00009.safetensors") as tensors:
            name = "layers.0.ffn.experts.0.w1.scale"
            dtype, shape, data = tensors[name]
            tensors[name] = dtype, shape, bytes(max(byte - 1, 0) for byte in data)
        convert(other, tmp_path / "local", MP, workers=2)
        with serving(other) as changed:
            assert run(changed, tmp_path / "out").resumed_bytes == 0
        assert tree(tmp_path / "out") == tree(tmp_path / "local")


def stop_at(hub: Hub, shard: str) -> None:
    """The hub goes down when a whole shard is asked for."""
    down = threading.Event()

    def trouble(name: str, start: int, stop: int) -> Trouble:
        if name == shard and is_whole(start, stop):
            down.set()
        return Refuse(503, None) if down.is_set() else None

    hub.trouble = trouble


class TestContinuing:
    def test_when_the_hub_was_down(
        self, hub: Hub, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        stop_at(hub, "model-00007-of-00009.safetensors")
        with pytest.raises(UnreadableError, match="Run the same command again"):
            run(hub, tmp_path / "out")
        hub.sent.clear()
        report = finishes(hub, tmp_path / "out", reference(MP))
        assert report.resumed_bytes > 0.4 * report.bytes
        assert sum(hub.sent.values()) < 0.6 * report.bytes

    def test_from_the_folder_instead(
        self, hub: Hub, source: Path, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        stop_at(hub, LAYER)
        with pytest.raises(UnreadableError):
            run(hub, tmp_path / "out")
        convert(source, tmp_path / "out", MP, workers=2)  # may begin anew: these are other files
        assert tree(tmp_path / "out") == reference(MP)

    @pytest.mark.parametrize("lost", ["notes", "their end", "a note", "what arrived"])
    def test_when_the_workspace_was_damaged(
        self, lost: str, hub: Hub, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        stop_at(hub, LAYER)
        with pytest.raises(UnreadableError):
            run(hub, tmp_path / "out")
        work = tmp_path / "out" / FOLDER
        notes = (work / NOTES).read_bytes()
        if lost == "notes":
            (work / NOTES).unlink()
        elif lost == "their end":
            (work / NOTES).write_bytes(notes + b'0123 {"whole"')
        elif lost == "a note":
            (work / NOTES).write_bytes(notes.replace(b"1", b"2", 1))
        else:
            for path in work.glob(f"*{SUFFIX}"):
                with path.open("r+b") as file:
                    file.seek(path.stat().st_size // 2)
                    file.write(b"damage")
        report = finishes(hub, tmp_path / "out", reference(MP))
        assert (report.resumed_bytes > 0) == (lost in ("their end", "what arrived"))

    def test_a_finished_output_is_checked_and_left(
        self, hub: Hub, source: Path, tmp_path: Path
    ) -> None:
        run(hub, tmp_path / "out")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
        hub.sent.clear()
        report = run(hub, tmp_path / "out")
        assert report.resumed_bytes == report.bytes
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
        assert sum(hub.sent.values()) > sum(sizes(source).values())  # value by value

        other = Path(shutil.copytree(source, tmp_path / "other"))
        with edited_file(other / LAYER) as tensors:
            dtype, shape, data = tensors["layers.2.ffn_norm.weight"]
            tensors["layers.2.ffn_norm.weight"] = dtype, shape, data[:-1] + bytes([data[-1] ^ 1])
        with serving(other) as changed, pytest.raises(UsageError, match="OUT is not empty"):
            run(changed, tmp_path / "out")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


DRIVER = """
import sys
from pathlib import Path
from dsv4_quant.conversion import plan
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.hub import opened

plan.cuts.__defaults__ = (int(sys.argv[3]),)
with opened("someone/tiny", cache=Path(sys.argv[2], "cache"), endpoint=sys.argv[1]) as source:
    convert(source.folder, Path(sys.argv[2], "out"), Request("mp", 2), arrivals=source.arrivals)
"""


def started(hub: Hub, place: Path) -> subprocess.Popen[bytes]:
    """The same conversion in a process that can be killed, its temporary files in ``place``."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, hub.url, str(place), str(CUT)],
        env={**os.environ, "TMPDIR": str(place)}, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_cuts(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    journal = out / FOLDER / "journal"
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n") > count:
            return
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.01)
    pytest.fail("no progress")


class TestInAnotherProcess:
    @pytest.mark.parametrize("cuts", [3, 50])
    def test_killed(
        self, cuts: int, hub: Hub, reference: Callable[[Request], dict[str, str]], tmp_path: Path
    ) -> None:
        hub.pace = 0.02
        with started(hub, tmp_path) as process:
            wait_for_cuts(tmp_path / "out", cuts, process)
            process.kill()
        hub.pace = 0
        hub.sent.clear()
        with watched(tmp_path / "out") as seen:
            report = finishes(hub, tmp_path / "out", reference(MP))
        assert report.resumed_bytes >= cuts * CUT // 2
        assert 0 < max(seen) <= room_of(hub, tmp_path)

    def test_interrupted_while_it_waits(self, hub: Hub, tmp_path: Path) -> None:
        waiting = threading.Event()

        def stall(name: str, start: int, stop: int) -> Trouble:
            if is_whole(start, stop):
                waiting.set()
                return Refuse(429, "600")
            return None

        hub.trouble = stall
        with started(hub, tmp_path) as process:
            assert waiting.wait(60)
            time.sleep(0.5)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(30)
            assert time.monotonic() - began < 5
            assert process.stderr is not None and b"KeyboardInterrupt" in process.stderr.read()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no headers are left
        assert set(sizes(tmp_path / "out")) == {FOLDER}


def test_an_error_elsewhere_does_not_wait_for_what_comes(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    with edited_file(other / "model-00002-of-00009.safetensors") as tensors:
        dtype, shape, data = tensors["layers.0.ffn.experts.15.w3.scale"]
        tensors["layers.0.ffn.experts.15.w3.scale"] = dtype, shape, b"\xff" * len(data)
    with serving(other) as slow:
        slow.trouble = lambda name, start, stop: Refuse(503, "600") if (
            name == "model-00003-of-00009.safetensors" and is_whole(start, stop)
        ) else None  # fmt: skip
        began = time.monotonic()
        with pytest.raises(NotANumberError, match=r"experts\.15\.w3"):
            run(slow, tmp_path / "out", Request("hf", 1, "fp8"), workers=4)
        assert time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


def test_a_journal_that_fails_while_all_wait_for_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    def stall(name: str, start: int, stop: int) -> Trouble:
        if name == LAYER and is_whole(start, stop):
            waiting.set()
            return Refuse(503, "600")
        return None

    def fails(notes: Notes, cut: CutMade) -> None:
        if waiting.wait(0.005):
            time.sleep(0.5)  # until everything that is here has been read
            raise WriteError("The journal cannot be written")
        real(notes, cut)

    real, hub.trouble = Notes.record, stall
    monkeypatch.setattr(Notes, "record", fails)
    began = time.monotonic()
    with pytest.raises(WriteError, match="journal cannot be written"):
        run(hub, tmp_path / "out")
    assert time.monotonic() - began < 60


def test_a_plan_reads_what_the_stream_reads(source: Path) -> None:
    """All bytes of all files but the headers, once at least."""
    with Checkpoint.open(source) as checkpoint:
        for request in REQUESTS:
            plan = plans.make_plan(checkpoint, request)
            read = {one for ranges in plan.reads for one in ranges}
            total = sum(one.stop - one.start for one in read)
            assert total == checkpoint.folder.data_bytes
            index = json.loads((source / "model.safetensors.index.json").read_bytes())
            assert total == index["metadata"]["total_size"]
