"""ordered_gemm: the definition, the twin and the processor's loop agree in every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_quant.kernels import ops, ordered_gemm_torch
from dsv4_quant.kernels.fma_torch import fma
from dsv4_quant.model import dot
from dsv4_quant.model.linear import Workers, as_weight

Same = Callable[[Tensor, Tensor], None]

# M, N, K, block
SHAPES = [
    (1, 1, 1, 1024),
    (3, 5, 15, 1024),
    (33, 34, 16, 16),
    (2, 3, 100, None),
    (4, 40, 1040, 1024),
    (40, 4, 130, 48),
    (2, 2, 2100, 1024),
    (2, 2, 2100, None),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(kind: str, rows: int, cols: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, cols), np.float32)
    if kind == "bfloat16":  # products of two of them are exact, so all is
        return torch.from_numpy(normal).bfloat16().float()
    if kind == "tiny":  # products below the smallest normal number, and zeros of both signs
        values = np.ldexp(normal, rng.integers(-80, -60, (rows, cols)).astype(np.int32))
        values[rng.random((rows, cols)) < 0.2] = -0.0
        return torch.from_numpy(values)
    if kind == "huge":  # sums that overflow, some to NaN
        return torch.from_numpy(np.ldexp(normal, rng.integers(40, 66, (rows, cols))))
    if kind == "special":  # in every third row one value
        some = np.arange(0, rows, 3)
        values = rng.choice([np.inf, -np.inf, np.nan, 3e38, -0.0], len(some))
        normal[some, rng.integers(0, cols, len(some))] = values
    return torch.from_numpy(normal)


KINDS = ["bfloat16", "normal", "tiny", "huge", "special"]


def operands(kind: str, shape: tuple[int, int, int, int | None]) -> tuple[Tensor, Tensor]:
    m, n, k, _ = shape
    return drawn(kind, m, k, seed=1), drawn(kind, n, k, seed=2)


def on_processor(x: Tensor, w: Tensor, block: int | None) -> Tensor:
    with Workers(1) as workers:
        return workers.linear(x, as_weight(w), block=block)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's fused multiply-add, which rounds twice, made to round once."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create(self: object, *operands: TensorHandle) -> TensorHandle:
        values = (torch.from_numpy(np.array(operand.data)) for operand in operands)
        return TensorHandle(fma(*values).numpy(), operands[-1].dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create)
    yield


@shapes
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_the_processor(
    kind: str, shape: tuple[int, int, int, int | None], same: Same, device: torch.device
) -> None:
    x, w = operands(kind, shape)
    found = ops.ordered_gemm(x.to(device), w.to(device), shape[3], backend="torch")
    same(found, on_processor(x, w, shape[3]))


@shapes
def test_the_twin_as_it_is(
    shape: tuple[int, int, int, int | None], same: Same, device: torch.device
) -> None:
    """With products that need no rounding: fused or not is the same."""
    x, w = operands("bfloat16", shape)
    found = ops.ordered_gemm(x.to(device), w.to(device), shape[3], backend="triton")
    same(found, on_processor(x, w, shape[3]))


@shapes
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_twin(
    kind: str,
    shape: tuple[int, int, int, int | None],
    same: Same,
    device: torch.device,
    fused: None,
) -> None:
    x, w = operands(kind, shape)
    found = ops.ordered_gemm(x.to(device), w.to(device), shape[3], backend="triton")
    same(found, on_processor(x, w, shape[3]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's multiply-add is fused")
def test_the_twin_multiplies_fused() -> None:
    """Without the fixture above the interpreter gives other bits: the kernel asks for its fma."""
    x, w = operands("normal", SHAPES[4])
    wanted = on_processor(x, w, 1024)
    assert (ops.ordered_gemm(x, w, 1024, backend="triton") != wanted).any()


def test_the_order_is_not_anyone_s() -> None:
    """The operands above can tell orders apart: another block or BLAS gives other bits."""
    for kind in ("bfloat16", "normal"):
        x, w = operands(kind, SHAPES[6])
        wanted = on_processor(x, w, 1024)
        assert (wanted != on_processor(x, w, None)).any(), kind
        assert (wanted != x @ w.T).any(), kind
    made = on_processor(*operands("special", SHAPES[4]), 1024)
    assert made.isnan().any() and made.isinf().any() and made.isfinite().any()


def test_the_processor_means_the_same() -> None:
    assert (ordered_gemm_torch.LANES, ordered_gemm_torch.BLOCK) == (dot.LANES, dot.BLOCK)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_operands_of_any_stride(backend: str, same: Same, device: torch.device) -> None:
    x, w = (part.to(device) for part in operands("bfloat16", SHAPES[5]))
    expected = ops.ordered_gemm(x, w, 48, backend="torch")
    turned, wide = x.mT.contiguous().mT, w.repeat_interleave(2, 1)[:, ::2]
    same(ops.ordered_gemm(turned, wide, 48, backend=backend), expected)  # type: ignore[arg-type]
    same(ops.ordered_gemm(x[3:], w[1:], 48, backend=backend), expected[3:, 1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 4, 64), (3, 0, 64), (3, 4, 0)])
@pytest.mark.parametrize("block", [1024, None])
def test_empty(
    shape: tuple[int, int, int], block: int | None, backend: str, same: Same, device: torch.device
) -> None:
    m, n, k = shape
    x, w = torch.ones(m, k, device=device), torch.ones(n, k, device=device)
    same(ops.ordered_gemm(x, w, block, backend=backend), torch.zeros(m, n))  # type: ignore[arg-type]


def test_rows_at_a_time(same: Same, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = operands("normal", SHAPES[2])
    monkeypatch.setattr(ordered_gemm_torch, "HELD_LANES", 34 * 16 * 4)
    same(ops.ordered_gemm(x, w, 16, backend="torch"), on_processor(x, w, 16))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_it_does_not_take(backend: str, device: torch.device) -> None:
    def call(x: Tensor, w: Tensor, block: int | None = 1024) -> None:
        ops.ordered_gemm(x.to(device), w.to(device), block, backend=backend)  # type: ignore[arg-type]

    x = torch.ones(2, 32)
    with pytest.raises(TypeError, match="float32 twice, got"):
        call(x, x.bfloat16())
    with pytest.raises(TypeError, match="float32 twice, got"):
        call(x.double(), x.double())
    for other in (torch.ones(2, 31), torch.ones(32), torch.ones(1, 2, 32)):
        with pytest.raises(ValueError, match=r"are no \[M, K\] and \[N, K\]"):
            call(x, other)
    for block in (0, -16, 24):
        with pytest.raises(ValueError, match=f"multiple of 16 values, not {block}"):
            call(x, x, block)
