"""The command line as a whole: help, discovery, start-up, exit codes."""

from __future__ import annotations

import ast
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4_quant import __version__
from dsv4_quant.cli.main import COMMANDS, app
from tests.folders import golden

CLI = Path(__file__).parents[2] / "cli"
HEAVY = ("torch", "triton", "numba", "huggingface_hub", "transformers", "rich")


def python(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *args], capture_output=True, text=True, timeout=60, **options
    )


def imported_by(*args: str) -> set[str]:
    """The modules in memory after a command."""
    code = (
        f"import sys; sys.argv = ['dsv4-quant', *{list(args)}]\n"
        "from dsv4_quant.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('MODULES', *sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("MODULES ")[1].split())


# --- discovery -----------------------------------------------------------------------------------


def test_the_table_lists_exactly_the_files_that_hold_a_command() -> None:
    files = {
        path.stem
        for path in CLI.glob("*.py")
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "command"
            for node in ast.parse(path.read_text()).body
        )
    }
    assert files == set(COMMANDS)


def test_help_lists_every_command_and_its_line() -> None:
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_the_shared_options(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert f"dsv4-quant {name}" in done.output.split("Example")[1]
    for option in ("--json", "--quiet", "--debug"):
        assert f"{option} " in done.output


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"dsv4-quant {__version__}\n"


# --- start-up ------------------------------------------------------------------------------------


def test_help_imports_no_library() -> None:
    modules = imported_by("--help")
    assert not modules & {*HEAVY, "numpy", "tqdm"}
    assert not any(f"dsv4_quant.cli.{name}" in modules for name in COMMANDS)


def test_inspect_imports_numpy_and_nothing_heavier() -> None:
    modules = imported_by("inspect", str(golden("tiny-fp4")))
    assert not modules & {*HEAVY, "tqdm"}


def test_synth_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not imported_by("synth", str(tmp_path / "out"), "--layers", "1") & set(HEAVY)


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Usage"),
        (["frobnicate"], "frobnicate"),
        (["inspect"], "PATH"),
        (["inspect", "x", "--gpus", "many"], "--gpus"),
        (["inspect", "x", "--json", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["inspect", "x", "--json", "/"], "--json"),
        (["synth", "x", "--experts", "int4"], "fp4"),
    ],
)
def test_wrong_usage_is_2(args: list[str], says: str) -> None:
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2
    assert says in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_python_m_and_its_exit_codes(tmp_path: Path) -> None:
    done = python("-m", "dsv4_quant", "inspect", str(golden("tiny-fp4")))
    assert (done.returncode, done.stderr) == (0, "")
    done = python("-m", "dsv4_quant", "inspect", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: There is no folder") and "Traceback" not in done.stderr


def test_a_reader_that_stops_early() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dsv4_quant", "inspect", str(golden("tiny-fp4"))],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write)
    assert done.returncode == 2
    assert done.stderr == "error: Whoever read the output stopped before its end.\n"


def test_ctrl_c(tmp_path: Path) -> None:
    """While a big checkpoint is being made: one line, 130, and nothing is left."""
    config = Path(__file__).parents[1] / "configs" / "V4-Flash.json"
    command = ["-m", "dsv4_quant", "synth", str(tmp_path / "out"), "--config", str(config)]
    with subprocess.Popen(
        [sys.executable, *command, "--layers", "1"], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "synthesising ...\n"
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(60) == 130
    assert rest.splitlines()[-1] == "Interrupted." and "Traceback" not in rest
    assert not (tmp_path / "out").exists()


def test_names_that_no_terminal_can_show(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe9"
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_quant", "synth", name, "--json", "-"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b'\\udcff\\udce9"' in done.stdout


def test_as_many_files_are_opened_as_may_be() -> None:
    """Every shard and every output file stays open; many shells allow 1,024."""
    program = f"""
import resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (32, min(most, 4096)))
from dsv4_quant.cli.main import main
sys.argv = ["dsv4-quant", "inspect", {str(golden("tiny-fp4"))!r}]
try:
    main()
finally:
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = python("-c", program)
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
    assert done.stdout.splitlines()[-1] == f"({most}, {most})", done.stderr
