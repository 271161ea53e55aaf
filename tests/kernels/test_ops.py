"""The face: who computes, and what an import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from dsv4_quant.kernels import ops

OPERATIONS = [
    "fp4_to_fp8",
    "fp4_to_bf16",
    "fp8_to_bf16",
    "quantise_fp4",
    "quantise_fp8",
    "act_quant",
    "fp4_act_quant",
    "block_dequant",
    "hadamard",
    "ordered_gemm",
    "fp8_gemm",
    "fp4_gemm",
    "sparse_attn",
    "hc_split_sinkhorn",
]


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(ops.VARIABLE, raising=False)


def test_argument_then_variable_then_best(monkeypatch):
    x = torch.zeros(1)
    assert ops.choose_backend(None, x) == "torch"  # a CPU tensor: the interpreter is no default
    for variable in ("torch", "triton"):
        monkeypatch.setenv(ops.VARIABLE, variable)
        assert ops.choose_backend("torch", x) == "torch"
        if not torch.cuda.is_available():
            assert ops.choose_backend(None, x) == variable
            assert ops.choose_backend("triton", x) == "triton"
    monkeypatch.setenv(ops.VARIABLE, "")
    assert ops.choose_backend(None, x) == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_served_by_triton():
    x = torch.zeros(1, device="cuda")
    assert ops.choose_backend(None, x) == "triton"
    assert ops.choose_backend(None, x, torch.zeros(1)) == "torch"  # not all of them
    assert ops.choose_backend("torch", x) == "torch"


def test_unknown_names_say_where_they_came_from(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; the backends are"):
        ops.choose_backend("cuda", torch.zeros(1))
    monkeypatch.setenv(ops.VARIABLE, "numba")
    with pytest.raises(ValueError, match="DSV4_QUANT_KERNELS is 'numba'"):
        ops.hadamard(torch.zeros(2, 4))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 before Python starts"):
        ops.hadamard(torch.zeros(2, 4), backend="triton")


@pytest.mark.parametrize("name", OPERATIONS)
def test_definition_twin_and_face_have_one_signature(name):
    face = inspect.signature(getattr(ops, name))
    assert face.parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    for backend in ("torch", "triton"):
        module = __import__(f"dsv4_quant.kernels.{name}_{backend}", fromlist=[name])
        operation = inspect.signature(getattr(module, name), eval_str=True)
        resolved = inspect.signature(getattr(ops, name), eval_str=True)
        assert list(operation.parameters.values()) == list(resolved.parameters.values())[:-1]
        assert operation.return_annotation == resolved.return_annotation


def test_definitions_and_the_face_import_nothing_fast():
    """Neither triton nor numba, until an operation of theirs is called."""
    names = [f"dsv4_quant.kernels.{name}_torch" for name in OPERATIONS]
    program = (
        f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]\n"
        "from dsv4_quant.kernels import ops, bounds_torch\n"
        "import torch; ops.hadamard(torch.zeros(2, 4))\n"
        "assert not {'triton', 'numba'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
