"""What an attacker of the promises would try: laundered damage, lost output, links."""

import shutil
from pathlib import Path

import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digesting import digest
from dsv4_quant.checkpoint.manifest import MANIFEST
from dsv4_quant.conversion.request import Request
from dsv4_quant.conversion.run import convert
from dsv4_quant.conversion.summary import plan_conversion
from dsv4_quant.errors import (
    ManifestError,
    SourceDamagedError,
    UnreadableError,
    UsageError,
    ValueNotExactError,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-fp4" / "checkpoint"
NORM = "layers.1.attn_norm.weight"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A sound checkpoint for two GPUs, with a manifest."""
    convert(GOLDEN, tmp_path / "ranks", Request("mp", 2))
    return tmp_path / "ranks"


def flip(root: Path, name: str, rank: int) -> None:
    """One wrong bit in one rank's copy of a weight."""
    with Checkpoint.open(root) as held:
        located = held.locate(held.stored(held.specs[name])[0])
    extent = (*located.extents, *located.copies)[rank]
    content = bytearray((root / extent.file).read_bytes())
    content[extent.offset] ^= 1
    (root / extent.file).write_bytes(content)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_damage_is_not_laundered_past_the_sources_own_manifest(ranks: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        flip(ranks, NORM, rank)
    with pytest.raises(SourceDamagedError, match="its own") as caught:
        convert(ranks, tmp_path / "out", Request("mp", 1))
    assert caught.value.tensor == NORM
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_restored_source_is_converted_to_the_end(ranks: Path, tmp_path: Path) -> None:
    convert(ranks, tmp_path / "good", Request("hf"))
    before = files(ranks)
    for rank in (0, 1):
        flip(ranks, NORM, rank)
    with pytest.raises(SourceDamagedError):
        convert(ranks, tmp_path / "out", Request("hf"))
    for name, content in before.items():
        (ranks / name).write_bytes(content)
    convert(ranks, tmp_path / "out", Request("hf"))
    assert files(tmp_path / "out") == files(tmp_path / "good")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_differ_are_refused(rank: int, ranks: Path, tmp_path: Path) -> None:
    (ranks / MANIFEST).unlink()
    flip(ranks, NORM, rank)
    with pytest.raises(SourceDamagedError, match="different things") as caught:
        convert(ranks, tmp_path / "out", Request("mp", 1))
    assert caught.value.tensor == NORM
    with pytest.raises(SourceDamagedError, match="different things"):
        digest(ranks)


def test_a_manifest_that_cannot_be_read_is_not_ignored(ranks: Path, tmp_path: Path) -> None:
    (ranks / MANIFEST).write_text("{}")
    with pytest.raises(ManifestError):
        convert(ranks, tmp_path / "out", Request("mp", 1))


def spoilt(tmp_path: Path) -> Path:
    """A source with a tile that FP8 cannot hold."""
    root = tmp_path / "spoilt"
    shutil.copytree(GOLDEN, root)
    with Checkpoint.open(root) as held:
        spec = held.specs["layers.0.ffn.experts.1.w1.weight"]
        extent = held.locate(held.stored(spec)[1]).extents[0]
    content = bytearray((root / extent.file).read_bytes())
    content[extent.offset] += 60
    (root / extent.file).write_bytes(content)
    return root


def test_overwrite_keeps_the_old_output_when_the_new_one_is_refused(
    ranks: Path, tmp_path: Path
) -> None:
    (ranks / "notes").mkdir()
    (ranks / "notes" / "mine.txt").write_text("mine")
    before = files(ranks)
    with pytest.raises(ValueNotExactError, match="would change a value"):
        convert(spoilt(tmp_path), ranks, Request("mp", 2, "fp8"), overwrite=True)
    assert files(ranks) == before


def test_overwrite_replaces_the_checkpoint_and_nothing_else(ranks: Path, tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "fresh", Request("mp", 4, "fp8"))
    (ranks / "model-notes.safetensors.txt").write_text("mine")
    convert(GOLDEN, ranks, Request("mp", 4, "fp8"), overwrite=True)
    expected = files(tmp_path / "fresh") | {"model-notes.safetensors.txt": b"mine"}
    assert files(ranks) == expected


def test_a_link_in_the_unfinished_folder_sends_no_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    (out / ".dsv4-partial").mkdir(parents=True)
    (out / ".dsv4-partial" / "model0-mp1.safetensors").symlink_to(victim)
    convert(GOLDEN, out, Request("mp", 1))
    convert(GOLDEN, tmp_path / "good", Request("mp", 1))
    assert victim.read_text() == "precious"
    assert files(out) == files(tmp_path / "good")


def test_an_unfinished_output_is_called_that(tmp_path: Path) -> None:
    (tmp_path / ".dsv4-partial").mkdir()
    with pytest.raises(UnreadableError, match="unfinished conversion"):
        Checkpoint.open(tmp_path)


def test_a_dry_run_refuses_an_out_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        plan_conversion(GOLDEN, tmp_path, Request("mp", 1))
