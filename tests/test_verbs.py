"""The verbs of ``import dsv4_quant``."""

import subprocess
import sys
from pathlib import Path

import pytest

import dsv4_quant

GOLDEN = Path(__file__).parent / "golden" / "tiny-fp4" / "checkpoint"
PACKAGE = Path(dsv4_quant.__file__).parent


@pytest.mark.parametrize("name", dsv4_quant.__all__)
def test_every_verb_is_callable_and_no_module_has_its_name(name: str) -> None:
    assert callable(getattr(dsv4_quant, name))
    assert not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()


def test_all_names_what_can_be_had() -> None:
    assert dsv4_quant.__all__ == sorted(dsv4_quant._VERBS)
    with pytest.raises(AttributeError, match="no_such_verb"):
        dsv4_quant.no_such_verb  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys, dsv4_quant;"
        "print(*{'torch', 'numpy', 'numba', 'typer', 'huggingface_hub'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.split() == []


def test_the_loop_as_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = dsv4_quant.convert(GOLDEN, tmp_path / "out", dsv4_quant.Request("mp", 2, "fp8"))
    assert dsv4_quant.inspect(tmp_path / "out").gpus == 2
    assert dsv4_quant.verify(tmp_path / "out", against=GOLDEN).holds
    assert dsv4_quant.digest(tmp_path / "out") == report.manifest.value_digest
    assert dsv4_quant.digest(GOLDEN) == report.manifest.value_digest
    assert capsys.readouterr() == ("", "")
