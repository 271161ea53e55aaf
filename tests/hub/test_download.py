"""Ids become folders, through a hub on 127.0.0.1 that cuts connections and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import UnreadableError
from dsv4_quant.hub import published_sha256, resolve
from tests.folders import golden
from tests.hub_server import COMMIT, Hub, serving

SHARD = "model-00002-of-00003.safetensors"
FETCHED = {
    "config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors", SHARD,
    "model-00003-of-00003.safetensors", "README.md", "LICENSE", "tokenizer.json",
    "inference/config.json", "inference/model.py", "chat_template.jinja",
}  # fmt: skip
LEFT = {
    "pytorch_model.bin", "original/model.safetensors", "figure.png", ".gitattributes", "x.pt",
    "extra/deep/model-00001-of-00001.safetensors",
}  # fmt: skip

# huggingface-hub reads its environment when it is imported: every case is a process of its own.
DRIVER = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from dsv4_quant.errors import Dsv4Error
from dsv4_quant.hub import resolve

constants.DOWNLOAD_CHUNK_SIZE = 16 << 10  # 10 MiB, more than any file here

class Told:
    def __init__(self): self.said = []
    def stage(self, text): self.said.append(["stage", text])
    def total(self, count): self.said.append(["total", count])
    def advance(self, count): self.said.append(["advance", count])

for src in sys.argv[2:]:
    told, found = Told(), {}
    try:
        found["path"] = str(resolve(src, progress=told, cache=Path(sys.argv[1])))
    except Dsv4Error as error:
        found |= {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(found | {"said": told.said}))
"""


def ask(cache: Path, url: str, *sources: str, **env: str) -> list[dict[str, Any]]:
    """``resolve`` of every source in a fresh process; nothing may reach its stdout."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", DRIVER, str(cache), *sources],
        capture_output=True,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": url,
            "HF_HOME": str(cache / "home"),
            "HF_HUB_DISABLE_XET": "1",
            **env,
        },
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "%|" not in done.stderr  # no bar of its own
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = Path(shutil.copytree(golden("tiny-fp4"), tmp_path / "served"))
    for name in (FETCHED | LEFT) - {path.name for path in root.iterdir()}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    with serving(root) as hub:
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_id_is_downloaded_once_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = ask(cache, hub.url, "someone/tiny", f"someone/tiny@{COMMIT}")
    folder = Path(first["path"])
    assert second["path"] == first["path"] and folder.name == COMMIT
    served = hub.files()
    assert contents(folder) == {name: served[name] for name in FETCHED}
    assert set(hub.asked) == FETCHED and set(hub.asked.values()) == {1}

    told = first["said"]
    size = sum(len(served[name]) for name in FETCHED)
    assert told[0] == ["stage", "downloading someone/tiny"]
    assert sum(count for what, count in told if what == "advance") == size
    assert max(count for what, count in told if what == "total") == size

    with Checkpoint.open(folder) as checkpoint:  # links into the cache are followed
        checkpoint.read("norm.weight")

    hub.asked.clear()
    (again,) = ask(cache, hub.url, "someone/tiny", HF_HUB_OFFLINE="1")
    assert again["path"] == first["path"] and not hub.asked
    (missing,) = ask(tmp_path / "empty", hub.url, "someone/tiny", HF_HUB_OFFLINE="1")
    assert missing["error"] == "UnreadableError"
    assert "does not hold all of someone/tiny" in missing["text"]
    assert "HF_HUB_OFFLINE" in missing["text"]


def test_a_cut_connection_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cut[SHARD] = 100_000
    hub.busy["model-00003-of-00003.safetensors"] = 429
    (found,) = ask(tmp_path / "cache", hub.url, "someone/tiny@main")
    assert contents(Path(found["path"]))[SHARD] == hub.files()[SHARD]
    assert hub.asked[SHARD] == 2
    (resumed,) = (said for said in hub.ranges if said.startswith(SHARD))
    start = int(resumed.split("bytes=")[1].split("-")[0])
    assert 0 < start <= 100_000 and start % (16 << 10) == 0


def test_a_killed_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    """Files that a run before completed are not fetched again."""
    cache = tmp_path / "cache"
    (first,) = ask(cache, hub.url, "someone/tiny")
    folder = Path(first["path"])
    blob = (folder / SHARD).resolve()
    (folder / SHARD).unlink()
    blob.rename(blob.with_name(f"{blob.name}.0abcdef0.incomplete"))
    hub.asked.clear()
    (second,) = ask(cache, hub.url, "someone/tiny")
    assert second["path"] == first["path"]
    assert contents(folder)[SHARD] == hub.files()[SHARD]
    assert dict(hub.asked) == {SHARD: 1}


def test_what_the_hub_refuses_is_explained(hub: Hub, tmp_path: Path) -> None:
    cases = {
        "someone/else": ("UsageError", "no folder of that name", "log in with `hf auth login`"),
        "someone/gated": ("UsageError", "is gated", "Accept its terms"),
        "someone/tiny@v9": ("UsageError", "someone/tiny has no revision 'v9'", "branch, a tag"),
        "some--one/tiny": ("UsageError", "some--one/tiny", "not an id"),
    }
    for src, found in zip(cases, ask(tmp_path / "cache", hub.url, *cases), strict=True):
        error, *says = cases[src]
        assert found["error"] == error, found
        assert all(part in found["text"] for part in says), found
        assert found["text"].isprintable() and len(found["text"]) < 600


def test_no_network(tmp_path: Path) -> None:
    with serving(tmp_path) as closed:
        url = closed.url
    (found,) = ask(tmp_path / "cache", url, "someone/tiny")
    assert found["error"] == "UnreadableError"
    assert "The hub cannot be reached" in found["text"] and "Is the network up" in found["text"]


def test_hashes_that_the_hub_published(hub: Hub, tmp_path: Path) -> None:
    """Of the weights only; and they tell false bytes, which the download does not."""
    hub.false_bytes.add(SHARD)
    (found,) = ask(tmp_path / "cache", hub.url, "someone/tiny")
    folder = Path(found["path"])
    published = published_sha256(folder)
    served = hub.files()
    weights = {name for name in FETCHED if name.endswith(".safetensors")}
    assert published == {n: hashlib.sha256(served[n]).hexdigest() for n in sorted(weights)}
    wrong = {
        name
        for name, sha256 in published.items()
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256
    }
    assert wrong == {SHARD}


LOCAL_DIR = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("someone/tiny", local_dir=sys.argv[1], allow_patterns=["*.safetensors", "*.json"])
"""


def test_hashes_noted_in_a_folder_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """As `hf download --local-dir` leaves it."""
    subprocess.run(
        [sys.executable, "-c", LOCAL_DIR, str(tmp_path / "here")],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
             "HF_HUB_DISABLE_XET": "1"},
    )  # fmt: skip
    served = hub.files()
    weights = [name for name in served if name.endswith(".safetensors")]
    assert published_sha256(tmp_path / "here") == {
        name: hashlib.sha256(served[name]).hexdigest() for name in sorted(weights)
    }
    (tmp_path / "here" / SHARD).unlink()
    assert SHARD not in published_sha256(tmp_path / "here")


def test_a_folder_that_never_was_on_the_hub_has_no_published_hash(tmp_path: Path) -> None:
    assert published_sha256(golden("tiny-fp4")) == {}
    assert published_sha256(tmp_path / "none") == {}
    (tmp_path / "x.safetensors").symlink_to(tmp_path / ("0" * 64))
    assert published_sha256(tmp_path) == {}
    notes = tmp_path / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (tmp_path / "a").touch()
    for content in (b"", b"commit", b"c\n" + b"g" * 64, b"c\n" + b"a" * 40, b"\xff" * 10_000):
        (notes / "a.metadata").write_bytes(content)
        assert published_sha256(tmp_path) == {}


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name@v1").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for src in ("owner/name", "owner/name@v1", "./owner/name", str(tmp_path), ".", "link"):
        assert resolve(src) == Path(src)
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "src",
    ["", "none", "./owner/none", "/no/such/folder", "../a/b", "a/b/c", "owner/", "/name", "~/x",
     "owner/name@", "owner/name@../..//x y", "owner/na me", "a\0b/c", "owner/name\n", "öwner/name",
     "-owner/name", "owner/name@-x"],
)  # fmt: skip
def test_what_is_neither_folder_nor_id(
    src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableError, match="no Hugging Face id") as caught:
        resolve(src)
    assert str(caught.value).isprintable() and "deepseek-ai/DeepSeek-V4-Flash" in str(caught.value)


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import huggingface_hub

    from dsv4_quant.errors import DiskSpaceError

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(DiskSpaceError, match="HF_HOME"):
        resolve("someone/tiny", cache=tmp_path)


def test_any_other_failure_is_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> str:
        raise OSError("Consistency check failed:\n  file should be of size 5 " + "x" * 10_000)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UnreadableError, match="Consistency check failed: file") as caught:
        resolve("someone/tiny", cache=tmp_path)
    assert "what is complete is kept" in str(caught.value)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
