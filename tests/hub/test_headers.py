"""An id as a folder of headers and holes: what it holds, what it costs, and what is refused."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import Dsv4Error, SourceDamagedError, UnreadableError, UsageError
from dsv4_quant.hub import Source, opened
from dsv4_quant.inspection import inspect
from dsv4_quant.validators.verify import verify
from tests.hub.conftest import Weather
from tests.hub_server import COMMIT, Hub, Send, serving

SHARD = "model-00002-of-00003.safetensors"
SHARDS = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
FETCHED = {
    "config.json", "model.safetensors.index.json", "tokenizer.json", "README.md",
    "inference/model.py", *SHARDS,
}  # fmt: skip


def open_id(hub: Hub, cache: Path, name: str = "someone/tiny") -> Any:
    return opened(name, cache=cache, endpoint=hub.url, pause=0.001)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_headers_are_true_and_data_are_holes(hub: Hub, tmp_path: Path) -> None:
    with open_id(hub, tmp_path) as source:
        names = {p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*.*")}
        assert names == FETCHED
        for name, data in hub.files().items():
            if name not in FETCHED:
                continue
            path = source.folder / name
            if not name.endswith(".safetensors"):
                assert path.read_bytes() == data
                continue
            start = data_start(path)
            assert path.read_bytes() == data[:start] + bytes(len(data) - start)
            assert path.stat().st_blocks * 512 < start + 8192
        folder = source.folder
    assert not folder.exists() and not folder.parent.exists()
    assert not [p for p in tmp_path.iterdir() if p.name != "served"]  # nothing is cached


def test_what_headers_tell_is_the_same(hub: Hub, tmp_path: Path) -> None:
    with open_id(hub, tmp_path) as source:
        there, here = inspect(source.folder, 2), inspect(hub.root, 2)
        assert replace(there, path="") == replace(here, path="")
        report = verify(source.folder, "structure")
        (hub.root / "pytorch_model.bin").unlink()  # which is never fetched
        findings = [asdict(found) for found in verify(hub.root, "structure").findings]
        assert [asdict(found) for found in report.findings] == findings


def test_a_large_shard_costs_its_header_and_little_more(hub: Hub, tmp_path: Path) -> None:
    with open_id(hub, tmp_path):
        pass
    assert max(hub.sent.values()) <= 256 << 10
    assert hub.asked[SHARD] == 1


def test_a_header_that_is_longer_than_the_first_request(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4_quant.hub.headers.FIRST_BYTES", 1000)
    with open_id(hub, tmp_path) as source:
        Checkpoint.open(source.folder).close()
        start = data_start(hub.root / SHARD)
        assert (source.folder / SHARD).read_bytes()[:start] == (hub.root / SHARD).read_bytes()[
            :start
        ]
        assert hub.sent[SHARD] == start


def test_data_cannot_be_read_by_mistake(hub: Hub, tmp_path: Path) -> None:
    with (
        open_id(hub, tmp_path) as source,
        Checkpoint.open(source.folder, arrivals=source.arrivals) as checkpoint,
        pytest.raises(RuntimeError, match="nothing brings its data"),
    ):
        checkpoint.read("norm.weight")


def test_bad_weather(hub: Hub, tmp_path: Path) -> None:
    hub.trouble = Weather(5)
    for _ in range(4):
        with open_id(hub, tmp_path) as source:
            inspect(source.folder)


def test_a_commit_or_branch_can_be_named(hub: Hub, tmp_path: Path) -> None:
    for name in ("someone/tiny@main", f"someone/tiny@{COMMIT}"):
        with open_id(hub, tmp_path, name) as source:
            assert source.folder.name == f"someone--tiny@{COMMIT[:12]}"


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as source:
        assert source == Source(tmp_path)


class TestTheCache:
    def fill(self, hub: Hub, cache: Path) -> Path:
        """As huggingface-hub lays it out."""
        home = cache / "models--someone--tiny"
        shutil.copytree(hub.root, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        return home / "snapshots" / COMMIT

    def test_what_it_holds_complete_is_used(self, hub: Hub, tmp_path: Path) -> None:
        folder = self.fill(hub, tmp_path)
        with open_id(hub, tmp_path) as source:
            assert source == Source(folder)
        assert not hub.asked

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
    def test_what_it_holds_in_part_is_not(
        self, hub: Hub, tmp_path: Path, damage: Callable[[Path], object]
    ) -> None:
        damage(self.fill(hub, tmp_path) / SHARD)
        with open_id(hub, tmp_path) as source:
            assert source.arrivals is not None

    def test_it_must_do_where_there_is_no_hub(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = self.fill(hub, tmp_path)
        with serving(tmp_path / "served") as closed:
            pass
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with opened("someone/tiny", cache=tmp_path) as source:
            assert source == Source(folder)
        with (
            pytest.raises(UnreadableError, match="does not hold all of someone/tiny"),
            opened("someone/tiny", cache=tmp_path / "none"),
        ):
            pass

    def test_it_must_do_where_the_hub_does_not_answer(self, hub: Hub, tmp_path: Path) -> None:
        folder = self.fill(hub, tmp_path)
        with serving(tmp_path / "served") as closed:
            pass
        with open_id(closed, tmp_path) as source:
            assert source == Source(folder)


class TestWhatTheHubLists:
    def test_hashes_that_the_listing_lacks_are_asked_for(self, hub: Hub, tmp_path: Path) -> None:
        """Where a listing has no LFS entries, its blob ids are those of pointers."""
        hub.lists = lambda entry: {**entry, "lfs": None, "blobId": "0" * 40} if (
            str(entry["rfilename"]).endswith(".safetensors")
        ) else entry  # fmt: skip
        with open_id(hub, tmp_path) as source:
            name, (size, sha256) = next(iter(source.arrivals.stamps.items()))
            data = hub.files()[name]
            assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())

    def test_a_file_without_any_hash_is_refused(self, hub: Hub, tmp_path: Path) -> None:
        hub.lists = lambda entry: {**entry, "lfs": None}
        hub.etags = {SHARD: "unheard-of"}
        with (
            pytest.raises(UnreadableError, match=f"no size and hash of {SHARD}.*hf download"),
            open_id(hub, tmp_path),
        ):
            pass

    @pytest.mark.parametrize(
        "name",
        ["/etc/config.json", "a/../../config.json", "a//b.json", "a\\b.json", "x\n.json",
         "a/./config.json"],
    )  # fmt: skip
    def test_a_name_that_leads_elsewhere(self, name: str, hub: Hub, tmp_path: Path) -> None:
        hub.lists = lambda entry: {**entry, "rfilename": name}
        with pytest.raises(UnreadableError, match="cannot be"), open_id(hub, tmp_path):
            pass

    @pytest.mark.parametrize("size", [-1, 1 << 60, "7", 1.5, True])
    def test_an_absurd_size(self, size: Any, hub: Hub, tmp_path: Path) -> None:
        hub.lists = lambda entry: {**entry, "size": size}
        with pytest.raises(UnreadableError, match="no size and hash"), open_id(hub, tmp_path):
            pass

    def test_no_file_of_a_checkpoint(self, hub: Hub, tmp_path: Path) -> None:
        hub.lists = lambda entry: {**entry, "rfilename": f"../{entry['rfilename']}"}
        with open_id(hub, tmp_path) as source, pytest.raises(UnreadableError, match="holds no"):
            inspect(source.folder)

    def test_a_gigabyte_beside_the_weights(self, hub: Hub, tmp_path: Path) -> None:
        hub.lists = lambda entry: {**entry, "size": 1 << 30}
        with pytest.raises(UnreadableError, match="larger than 1 GiB"), open_id(hub, tmp_path):
            pass

    def test_a_commit_that_is_none(self, hub: Hub, tmp_path: Path) -> None:
        hub.commit = "main"
        with pytest.raises(UnreadableError, match="which commit"), open_id(hub, tmp_path):
            pass


class TestLies:
    def test_a_small_file_with_other_bytes(self, hub: Hub, tmp_path: Path) -> None:
        size = len(hub.files()["config.json"])
        hub.trouble = lambda name, start, stop: Send(bytes(size)) if name == "config.json" else None
        expected = hashlib.sha1(b"blob %d\0" % size + hub.files()["config.json"]).hexdigest()
        with pytest.raises(SourceDamagedError) as caught, open_id(hub, tmp_path):
            pass
        assert f"expected {expected}, found" in str(caught.value)
        assert "someone/tiny/config.json" in str(caught.value)
        assert hub.asked["config.json"] == 2

    def test_once_is_forgiven(self, hub: Hub, tmp_path: Path) -> None:
        size = len(hub.files()["config.json"])
        lies = [Send(bytes(size))]
        hub.trouble = lambda name, start, stop: lies.pop() if (
            name == "config.json" and lies
        ) else None  # fmt: skip
        with open_id(hub, tmp_path) as source:
            inspect(source.folder)

    @pytest.mark.parametrize("head", [b"\xff" * 8, b"\0" * 8, (90_000_000).to_bytes(8, "little")])
    def test_a_header_that_cannot_be(self, head: bytes, hub: Hub, tmp_path: Path) -> None:
        path = hub.root / SHARD
        path.write_bytes(head + path.read_bytes()[8:])
        with (
            pytest.raises(UnreadableError) as caught,
            open_id(hub, tmp_path) as source,
        ):
            inspect(source.folder)
        assert f"(file someone/tiny@{COMMIT[:12]}/{SHARD})" in str(caught.value)
        assert "tmp" not in str(caught.value)  # that folder is gone


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    for name, what in {
        "someone/else": "no folder of that name",
        "someone/gated": "is gated",
        "someone/tiny@v9": "has no revision 'v9'",
        "some--one/tiny": "not an id",
    }.items():
        with pytest.raises(UsageError, match=what), open_id(hub, tmp_path, name):
            pass
    with pytest.raises(Dsv4Error, match="no Hugging Face id"), opened("none"):
        pass
