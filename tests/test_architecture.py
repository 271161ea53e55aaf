"""The project's own rules, read off its source: who may import whom, and what else must not be.

A rule that fails here is either broken by accident, or changed on purpose: then change it here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from dsv4_quant.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = {"cli": "cli", "kernels": "kernels", "validators": "validators"}
"""Parts of the package that stand at the top level."""

# Each part may import those above it, and itself; those on one line do not know each other.
LAYERS = (
    ("errors", "strict_json", "progress", "durable"),
    ("config_keys", "hub", "team"),
    ("config", "formats"),
    ("catalogue", "kernels"),
    ("checkpoint", "releases"),
    ("conversion", "model", "inspection"),
    ("synth_config", "synth_values", "synth_folder", "fingerprints"),
    ("synthesis", "reports", "calibration"),
    ("validators",),
    ("cli", "__init__"),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT_TORCH = ("model", "fingerprints", "calibration")


@cache
def texts() -> dict[Path, str]:
    """Every module of the package, once: the links in dsv4_quant/ are not followed."""
    found = [
        path
        for folder in ("dsv4_quant", *FOLDERS.values())
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]
    real = [p for p in found if not any(parent.is_symlink() for parent in p.parents)]
    return {path: path.read_text() for path in real}


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(text, str(path)) for path, text in texts().items()}


def part_of(path: Path) -> str:
    """``checkpoint`` of dsv4_quant/checkpoint/header.py, ``cli`` of cli/main.py."""
    first, *rest = path.relative_to(ROOT).parts
    return first if first in FOLDERS else Path(rest[0]).stem


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("dsv4_quant", *parts) if parts[0] in FOLDERS else parts
    return ".".join(parts).removesuffix(".__init__")


def imports(tree: ast.Module, *, lazy: bool = True) -> Iterator[str]:
    """Modules imported; ``from dsv4_quant import x`` counts as ``dsv4_quant.x``.

    With ``lazy=False`` only those that importing the module imports: not the ones inside
    functions or under TYPE_CHECKING.
    """
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not used here"
            if node.module == "dsv4_quant":
                yield from (f"dsv4_quant.{alias.name}" for alias in node.names)
            else:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not lazy and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        todo.extend(ast.iter_child_nodes(node))


def parts_imported(path: Path) -> set[str]:
    """Parts of the package that a module imports, ever."""
    names = (name.split(".") for name in imports(sources()[path]))
    return {
        name[1]
        for name in names
        if name[0] == "dsv4_quant" and len(name) > 1 and not name[1].startswith("__")
    }


def test_the_test_sees_the_whole_package() -> None:
    parts = {part_of(path) for path in sources()}
    assert len(sources()) > 60 and {"config", "checkpoint", "cli", "kernels", "validators"} <= parts
    assert parts <= set(RANK), "a new part: say in LAYERS where it stands"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    upwards = {i for i in parts_imported(path) if i != part and RANK[i] >= RANK[part]}
    assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


def reachable(start: str) -> set[str]:
    """Every part that a part imports, and those that they import."""
    direct: dict[str, set[str]] = {}
    for path in sources():
        direct.setdefault(part_of(path), set()).update(parts_imported(path))
    found, todo = set[str](), [start]
    while todo:
        for part in direct.get(todo.pop(), set()) - found:
            found.add(part)
            todo.append(part)
    return found


def test_judges_never_import_the_accused() -> None:
    assert "checkpoint" in reachable("validators")
    assert not {"conversion", "synthesis", "cli"} & reachable("validators")
    assert "model" not in reachable("conversion") and "conversion" not in reachable("model")


def test_only_the_command_line_prints() -> None:
    for path, tree in sources().items():
        if part_of(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(tree):
            said = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert said not in ("print", "breakpoint", "input"), f"{path}:{node.lineno}"
            assert used not in ("sys.stdout", "sys.stderr"), f"{path}:{node.lineno}"


def test_torch_stays_where_it_belongs() -> None:
    heavy = ("torch", "triton", "transformers")
    for path, tree in sources().items():
        allowed = part_of(path) in MAY_IMPORT_TORCH or path.stem.endswith(("_torch", "_triton"))
        if allowed or module_of(path) == "dsv4_quant.kernels.ops":
            continue
        names = {name for name in imports(tree, lazy=False) if name.split(".")[0] in heavy}
        assert not names, f"{path} imports {sorted(names)}"


def test_the_conversion_path_reaches_no_torch() -> None:
    """By source: follow every import that importing convert, checkpoint and the face make."""
    trees = {module_of(path): tree for path, tree in sources().items()}
    todo = [
        m for m in trees if m == "dsv4_quant" or m.split(".")[1] in ("conversion", "checkpoint")
    ]
    seen = set(todo)
    while todo:
        module = todo.pop()
        for name in imports(trees[module], lazy=False):
            assert name.split(".")[0] not in ("torch", "triton"), f"{module} imports {name}"
            if name in trees and name not in seen:
                seen.add(name)
                todo.append(name)
    assert len(seen) > 20


# numba takes a third of a second, huggingface_hub and PyTorch take seconds.
LIGHT = """
import importlib, sys
from dsv4_quant.cli.main import main

def check(what):
    heavy = {{"torch", "triton", "transformers", "huggingface_hub", "numba", "tqdm"}}
    assert not heavy & set(sys.modules), (what, heavy & set(sys.modules))

def run(arguments):
    sys.argv = ["dsv4-quant", *arguments.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)

for one in {things!r}:
    {do}(one)
    check(one)
"""


def light(do: str, things: list[str]) -> None:
    """One thing after the other in a fresh interpreter, which must not import what takes long."""
    code = LIGHT.format(do=do, things=things)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_starting_imports_nothing_heavy() -> None:
    """The commands' ``--help`` needs their modules and no more."""
    commands = [f"dsv4_quant.cli.{name}" for name in COMMANDS]
    assert len(commands) >= 10
    light("importlib.import_module", [
        "dsv4_quant", "dsv4_quant.cli.main", "dsv4_quant.hub", "dsv4_quant.conversion.run",
        "dsv4_quant.validators.verify", *commands,
    ])  # fmt: skip


def test_what_reads_headers_alone_imports_nothing_heavy(tmp_path: Path) -> None:
    src, out = ROOT / "tests" / "golden" / "tiny-fp4" / "checkpoint", tmp_path / "out"
    light("run", [
        f"inspect {src} --gpus 2",
        f"verify {src} --level structure --quiet",
        f"convert {src} {out} --gpus 2 --experts fp8 --dry-run",
        f"repack {src} {out} --layout hf --dry-run",
    ])  # fmt: skip


# Modules whose numbers are a model's or a published constant's; elsewhere a 128 is most likely a
# block size, which is data.
HOLD_128 = {
    "dsv4_quant/config.py": "FP8_BLOCK, the published block where the config does not say",
    "dsv4_quant/releases.py": "the published models' sizes",
    "dsv4_quant/synth_config.py": "the tiny models' sizes",
    "dsv4_quant/model/arithmetic.py": "the published group of quantised activations",
}


def spelt(path: Path, node: ast.Constant) -> str:
    """A constant on one line as the source spells it."""
    line = texts()[path].encode().splitlines()[node.lineno - 1]
    return line[node.col_offset : node.end_col_offset].decode("utf-8", "replace")


def test_block_sizes_are_data() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path, tree in sources().items()
        if part_of(path) not in ("kernels", "cli")  # their 128s are bits and exit codes
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and type(node.value) is int
        and spelt(path, node) == "128"  # 0x80 is bits, too
    }
    assert found == set(HOLD_128)


def test_the_published_block_is_named_once() -> None:
    pairs = ("(128, 128)", "[128, 128]")
    found = [
        f"{path.relative_to(ROOT).as_posix()}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple | ast.List) and ast.unparse(node) in pairs
    ]
    assert sorted(found) == ["dsv4_quant/config.py", "dsv4_quant/synth_config.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_is_described(path: Path) -> None:
    tree = sources()[path]
    assert ast.get_docstring(tree), "a module says first what it is for"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if "triton.jit" in decorators:  # device functions: their modules describe them
            continue
        assert ast.get_docstring(node), node.name
        bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        if "Protocol" in bases or isinstance(node, ast.FunctionDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"


def test_no_wildcards_no_bare_excepts_no_debris() -> None:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), where
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "TODO" not in node.value and "FIXME" not in node.value, where
        lines = texts()[path].splitlines()
        assert not [line for line in lines if "# TODO" in line or "# FIXME" in line], path


def test_packages_are_the_folders_on_disk() -> None:
    """packages.find loses folders silently; an explicit list is forgotten as silently."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {module_of(path).rpartition(".")[0] or "dsv4_quant" for path in sources()
               if path.name != "__init__.py"}  # fmt: skip
    on_disk |= {module_of(path) for path in sources() if path.name == "__init__.py"}
    assert sorted(setuptools["packages"]) == sorted(on_disk)
    assert setuptools["package-dir"] == {
        "dsv4_quant": "dsv4_quant",
        **{f"dsv4_quant.{name}": folder for name, folder in FOLDERS.items()},
    }


def test_the_house_is_as_the_packaging_needs_it() -> None:
    for name, folder in FOLDERS.items():
        link = ROOT / "dsv4_quant" / name
        assert link.is_symlink() and link.readlink() == Path("..") / folder
        assert not (ROOT / folder / "__init__.py").exists(), "bare names are other people's"
    inside = [p for p in (ROOT / "dsv4_quant").iterdir() if p.is_dir() and not p.is_symlink()]
    for folder in inside:
        if any(folder.glob("*.py")):
            assert (folder / "__init__.py").exists(), folder
    for needless in ("conftest.py", "tests/__init__.py"):
        assert not (ROOT / needless).exists()
    for a, b in pairwise(LAYERS):
        assert not set(a) & set(b)
