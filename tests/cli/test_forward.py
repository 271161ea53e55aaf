"""``dsv4-quant forward``: the logits, as a file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.cli.logits import LogitsFile
from dsv4_quant.cli.main import app
from dsv4_quant.cli.progress import Lines
from dsv4_quant.cli.tables import size
from dsv4_quant.cli.tokens import MAX_TOKENS, read_tokens
from dsv4_quant.errors import UnreadableError
from dsv4_quant.model import forward
from tests.folders import golden

PROMPTS = [[0, 5, 17, 300, 2, 9], [3]]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["forward", *map(str, args)])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "T.json"
    path.write_text(json.dumps(PROMPTS))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arithmetic": "deployed", "activations": "bfloat16"},
        {"mtp": True, "decode": 2, "threads": 1},
    ],
)
def test_the_file_holds_what_forward_returns(
    options: dict[str, str | int], tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "L.safetensors"
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    result = run(golden("tiny-fp4"), "--tokens", tokens, "--output", out, *words)
    assert result.exit_code == 0, result.output
    with Checkpoint.open(golden("tiny-fp4")) as ckpt:
        expected = forward(ckpt, PROMPTS, **options)
    found = load_file(out)
    assert sorted(found) == sorted(
        [f"logits.{i}" for i in (0, 1)]
        + ([f"mtp_logits.{i}" for i in (0, 1)] if "mtp" in options else [])
    )
    for name, rows in found.items():
        kind, i = name.split(".")
        assert rows.dtype == np.float32 and rows.shape == (len(PROMPTS[int(i)]), 512)
        assert rows.tobytes() == getattr(expected, kind)[int(i)].numpy().tobytes()
    again = tmp_path / "again"
    save_file(found, again)
    assert again.read_bytes() == out.read_bytes(), "safetensors writes the same file"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("mtp", [False, True])
def test_what_is_written_in_pieces_is_the_same_file(
    mtp: bool, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for prompts whose logits are larger than the head."""
    words = ["--mtp"] if mtp else []
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    run(golden("tiny-fp4"), "--tokens", tokens, "--output", whole, *words)
    monkeypatch.setattr("dsv4_quant.model.head.stored_bytes", lambda spec: 0)
    monkeypatch.setattr("dsv4_quant.model.head.GROUP_BYTES", 4 * 512 * (1 + mtp) * 2)
    result = run(golden("tiny-fp4"), "--tokens", tokens, "--output", pieces, *words)
    assert result.exit_code == 0, result.output
    assert pieces.read_bytes() == whole.read_bytes()


def test_facts_and_progress(tokens: Path, tmp_path: Path) -> None:
    out, facts = tmp_path / "L.safetensors", tmp_path / "facts.json"
    result = run(golden("tiny-fp4"), "--tokens", tokens, "--output", out, "--json", facts)
    assert "7 tokens in 2 prompts" in result.stdout
    assert "forward pass: 6 steps in" in result.stderr
    said = json.loads(facts.read_text())
    reading = said["reading"]
    assert reading["bytes_read"] == reading["bytes_needed"] > 1_000_000
    assert 0 <= reading["waiting_seconds"] <= reading["seconds"] <= said["seconds"]
    amount = size(reading["bytes_read"])
    assert f"read {amount} of {amount} needed in" in " ".join(result.stdout.split())
    assert "s waiting for the disk, which gave" in " ".join(result.stdout.split())
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[1:])
    assert f", {amount} read" in result.stderr
    assert (said["tokens"], said["vocab_size"], said["arithmetic"]) == ([6, 1], 512, "exact")
    assert len(said["experts_hit"]) == 5 and all(said["experts_hit"])
    quiet = run(golden("tiny-fp4"), "--tokens", tokens, "--output", out, "--quiet")
    assert (quiet.stdout, quiet.stderr, quiet.exit_code) == ("", "", 0)


def test_layers_are_counted_and_the_time_left_is_told() -> None:
    stream, now = io.StringIO(), [0.0]
    lines = Lines(stream, lambda: now[0])
    lines.stage("forward pass", "steps")
    lines.total(45)
    for step in range(3):
        now[0] += 10
        lines.read(step << 30)
        lines.advance(1)
    lines.close()
    lines.stage("the next one", "steps")
    lines.advance(1)
    lines.close()
    assert stream.getvalue().splitlines()[1:] == [
        "forward pass: 1 of 45 steps (2 %), 7 min 20 s left",
        "forward pass: 2 of 45 steps (4 %), 1.00 GiB read, 7 min 10 s left",
        "forward pass: 3 of 45 steps (6 %), 2.00 GiB read, 7 min 0 s left",
        "forward pass: 3 steps in 30 s, 2.00 GiB read",
        "the next one ...",
        "the next one: 1 steps in 0 s",
    ]


def test_a_file_that_was_there_is_replaced_only_by_a_whole_one(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "L.safetensors"
    out.write_text("before")

    def fail(file: LogitsFile, prompt: int, first: int, rows: object, *, mtp: bool) -> None:
        assert out.with_name("L.safetensors.partial").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LogitsFile, "logits", fail)
    result = run(golden("tiny-fp4"), "--tokens", tokens, "--output", out)
    assert result.exit_code == 2 and "No space left" in result.stderr
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["L.safetensors", "T.json"]


def test_room_is_looked_for_before_the_pass(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 100})())
    result = run(golden("tiny-fp4"), "--tokens", tokens, "--output", tmp_path / "L.safetensors")
    assert result.exit_code == 2 and "14,336 bytes" in result.stderr
    assert "forward pass" not in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no prompts"),
        ("{}", "not a list of 1 to 1,024 prompts"),
        ("[]", "not a list of 1 to 1,024 prompts"),
        ("[1, 2]", "prompt 0 is 1, not a list of ids"),
        ("[[1], []]", "prompt 1 is []"),
        ("[[1, true]]", "prompt 0 holds True"),
        ('[["1"]]', "prompt 0 holds '1'"),
        ("[[1.0]]", "not an integer"),
        ("[[-1]]", "not an integer"),
        ("[[1], [[2]]]", "prompt 1 holds [2]"),
        (json.dumps([[1] * (MAX_TOKENS + 1)]), "65,537 tokens"),
        (json.dumps([[1]] * 1025), "1025 values"),
        ("[" * 100_000, "nested too deeply"),
        (" " * (5 << 20), "larger than 4,194,304 bytes"),
    ],
)
def test_prompts_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "T.json"
    path.write_text(text)
    with pytest.raises(UnreadableError) as refused:
        read_tokens(path)
    assert says in str(refused.value) and "T.json" in str(refused.value)


def test_wrong_usage_ends_with_2(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "L.safetensors"
    beyond = tmp_path / "beyond.json"
    beyond.write_text("[[512]]")
    ckpt = golden("tiny-fp4")
    for args, says in (
        ((ckpt, "--tokens", tmp_path / "none.json", "--output", out), "No such file"),
        ((ckpt, "--tokens", beyond, "--output", out), "the vocabulary ends at 511"),
        ((ckpt, "--tokens", tokens, "--output", tmp_path), "cannot be written"),
        ((ckpt, "--tokens", tokens, "--output", tmp_path / "no" / "L"), "cannot be written"),
        ((tmp_path, "--tokens", tokens, "--output", out), "holds no model-"),
        ((ckpt, "--tokens", tokens), "--output"),
    ):
        result = run(*args)
        assert result.exit_code == 2 and says in " ".join(result.stderr.split()), args
    assert not out.exists()
