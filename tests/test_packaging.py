"""The wheel holds every module, under the import names that users have."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dsv4_quant", "cli", "kernels", "validators")


def modules_on_disk() -> set[str]:
    found = set()
    for folder in FOLDERS:
        prefix = "" if folder == "dsv4_quant" else "dsv4_quant."
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if folder == "dsv4_quant" and relative.parts[1] in FOLDERS:
                continue  # the same files again, through the symlinks
            found.add(prefix + ".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
    return found


def test_packages_are_those_on_disk() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rpartition(".")[0] for name in modules_on_disk()} - {""}
    assert set(setuptools["packages"]) == packages | {"dsv4_quant"}


def test_the_three_folders_are_no_packages_of_their_own() -> None:
    for folder in FOLDERS[1:]:
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "dsv4_quant" / folder).readlink() == Path("..") / folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked. Built from what git would list: a dirty tree leaks build/."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS,
         "pyproject.toml", "README.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(out), str(tree)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_wheel_holds_every_module(site: Path) -> None:
    held = {
        ".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
        for path in site.rglob("*.py")
    }
    assert held == modules_on_disk()


def test_every_module_imports_from_the_wheel(site: Path) -> None:
    names = sorted(modules_on_disk() - {"dsv4_quant.__main__"})
    script = (
        "import sys, importlib; site = sys.argv[1]; sys.path.insert(0, site)\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(site), (name, module.__file__)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(site), *names], cwd=site, check=True, timeout=300
    )


def test_console_script_is_declared(site: Path) -> None:
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "dsv4-quant = dsv4_quant.cli.main:main" in entry.read_text()
