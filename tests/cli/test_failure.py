"""Failures: one paragraph each, the right exit code, a traceback only when asked for."""

from __future__ import annotations

import errno

import pytest
import typer

from dsv4_quant.cli.failure import explain, guarded, wrapped
from dsv4_quant.errors import ConfigError, UsageError

CASES: list[tuple[BaseException, str]] = [
    (UsageError("Too many", hint="Give fewer."), "error: Too many. Give fewer."),
    (ConfigError("Key x", file="c.json", tensor="w"), "error: Key x. (file c.json, tensor w)"),
    (
        FileNotFoundError(errno.ENOENT, "No such file", "a.json"),
        "error: The system refused: No such file (file a.json).",
    ),
    (OSError("odd"), "error: The system refused: odd."),
    (BrokenPipeError(errno.EPIPE, "x"), "error: Whoever read the output stopped before its end."),
    (ImportError("no x"), "error: A library that this command needs cannot be loaded: no x."),
    (
        ValueError("two\nlines"),
        "error: A bug in dsv4-quant: ValueError: two lines. Please report it, with what --debug"
        " prints.",
    ),
    (AssertionError(), "error: A bug in dsv4-quant: AssertionError: . Please report it"),
    (KeyboardInterrupt(), "Interrupted."),
]


@pytest.mark.parametrize(("error", "says"), CASES, ids=lambda value: type(value).__name__)
def test_every_failure_is_one_paragraph(
    error: BaseException, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(debug: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    out, err = capsys.readouterr()
    assert caught.value.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert out == "" and "Traceback" not in err
    assert " ".join(err.split()).startswith(says)
    assert err.endswith("\n") and "\n\n" not in err


def test_memory_error_says_what_can_be_done() -> None:
    assert "--max-memory" in explain(MemoryError())


def test_a_long_message_is_cut() -> None:
    assert len(explain(ValueError("x" * 10_000))) < 500


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command(debug: bool = False) -> None:
        raise UsageError("Too many")

    with pytest.raises(typer.Exit):
        guarded(command)(debug=True)
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("error: Too many.\n")


@pytest.mark.parametrize("passed", [typer.Exit(1), typer.BadParameter("x")])
def test_typers_own_endings_pass(passed: Exception) -> None:
    def command() -> None:
        raise passed

    with pytest.raises(type(passed)) as caught:
        guarded(command)()
    assert caught.value is passed


def test_paragraphs_fit_the_terminal_and_break_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a-folder/with-a-name/that-is-longer/than-the-terminal/is-wide.safetensors"
    lines = wrapped(f"error: This is not what it should be ({path}). Do something else.").split(
        "\n"
    )
    assert all(len(line) <= 40 for line in lines if path not in line)
    assert any(path in line for line in lines)
