"""The face of the kernels: every operation once, computed by the definition or by its Triton twin.

Who computes is decided call by call: by the argument ``backend``, else by the environment variable
``DSV4_QUANT_KERNELS`` (``torch`` or ``triton``), else by what is best: Triton where every operand
lies on a GPU, the definition everywhere else. On a CPU the twin runs only when asked for by name,
and only in Triton's interpreter (``TRITON_INTERPRET=1`` before anything imports triton).

fp4_to_fp8         exact  FP4 weights to FP8 by the published rule, a verdict for every tile
fp4_to_bf16        exact  FP4 weights to BF16, and whether all of it fits
fp8_to_bf16        exact  FP8 weights to BF16, the same
quantise_fp4       exact  weights to FP4 by a scale rule, and what it cost
quantise_fp8       exact  weights to FP8, the same
act_quant          exact  activations to FP8, one power-of-two scale per group
fp4_act_quant      exact  activations to FP4, the same
block_dequant      exact  FP8 and FP4 with block scales to numbers
hadamard           exact  the rotation before fp4_act_quant
ordered_gemm       exact  float32 products, each sum in an order that is written down
fp8_gemm           bound  quantised activations times an FP8 weight
fp4_gemm           bound  quantised activations times an FP4 weight
sparse_attn        bound  attention to listed keys, with a sink
hc_split_sinkhorn  bound  mixing weights of the hyper-connections

exact: definition and twin agree bit for bit; bound: within the bound of ``bounds_torch``.
Triton is imported when it is first needed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dsv4_quant.config import FP8_BLOCK
from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels.defaults import ACT_GROUP, FP4_GROUP, FP8
from dsv4_quant.kernels.fp4_to_fp8_torch import Fp8Tiles
from dsv4_quant.kernels.ordered_gemm_torch import BLOCK
from dsv4_quant.kernels.quantised_torch import Quantised

Backend = Literal["torch", "triton"]

VARIABLE = "DSV4_QUANT_KERNELS"
"""The environment variable that names a backend."""


def choose_backend(backend: Backend | None, *operands: Tensor) -> Backend:
    """The backend for these operands. ValueError for a name that does not exist.

    RuntimeError where triton is named and cannot run: operands on a CPU and no interpreter.
    """
    on_gpu = all(operand.is_cuda for operand in operands)
    name = backend or os.environ.get(VARIABLE)
    if not name:
        return "triton" if on_gpu and find_spec("triton") else "torch"
    if name not in ("torch", "triton"):
        source = "backend" if backend else VARIABLE
        raise ValueError(f"{source} is {name!r}; the backends are 'torch' and 'triton'")
    if name == "triton" and not on_gpu and not _interpreting():
        raise RuntimeError(
            "the triton backend was named, but the operands are not on a GPU; move them there, or "
            "set TRITON_INTERPRET=1 before Python starts to run it in the (slow) interpreter"
        )
    return cast(Backend, name)


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _call(name: str, backend: Backend | None, operands: tuple[Tensor, ...], *rest: object) -> Any:
    """Call operation ``name`` of the backend chosen, with its operands' GPU as the current one."""
    module = importlib.import_module(
        f"dsv4_quant.kernels.{name}_{choose_backend(backend, *operands)}"
    )
    operation: Callable[..., Any] = getattr(module, name)
    device = operands[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return operation(*operands, *rest)


def fp4_to_fp8(
    codes: Tensor,
    scales: Tensor,
    fmt: Format = FP4,
    target: Format = FP8,
    *,
    backend: Backend | None = None,
) -> Fp8Tiles:
    """E4M3 codes ``[..., R, C]`` of a stack of FP4 weights, and a verdict for every tile.

    All of it: ``fp4_to_fp8_torch.fp4_to_fp8``.
    """
    return cast(Fp8Tiles, _call("fp4_to_fp8", backend, (codes, scales), fmt, target))


def fp4_to_bf16(
    codes: Tensor, scales: Tensor, fmt: Format = FP4, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """bfloat16 values ``[..., R, C]`` of a stack of FP4 weights, and flags ``[...]``.

    All of it: ``fp4_to_bf16_torch.fp4_to_bf16``.
    """
    return cast(tuple[Tensor, Tensor], _call("fp4_to_bf16", backend, (codes, scales), fmt))


def fp8_to_bf16(
    codes: Tensor, scales: Tensor, fmt: Format = FP8, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """bfloat16 values ``[..., R, C]`` of a stack of FP8 weights, and flags ``[...]``.

    All of it: ``fp8_to_bf16_torch.fp8_to_bf16``.
    """
    return cast(tuple[Tensor, Tensor], _call("fp8_to_bf16", backend, (codes, scales), fmt))


def quantise_fp4(
    x: Tensor,
    rule: ScaleRule = ScaleRule.LEAST_SQUARES,
    group: int = FP4_GROUP,
    *,
    backend: Backend | None = None,
) -> Quantised:
    """Packed E2M1 codes ``[..., R, C / 2]``, E8M0 scales and the cost of a stack of weights.

    All of it: ``quantise_fp4_torch.quantise_fp4``.
    """
    return cast(Quantised, _call("quantise_fp4", backend, (x,), rule, group))


def quantise_fp8(
    x: Tensor,
    rule: ScaleRule = ScaleRule.LEAST_SQUARES,
    block: tuple[int, int] = FP8_BLOCK,
    *,
    backend: Backend | None = None,
) -> Quantised:
    """E4M3 codes ``[..., R, C]``, E8M0 scales and the cost of a stack of weights.

    All of it: ``quantise_fp8_torch.quantise_fp8``.
    """
    return cast(Quantised, _call("quantise_fp8", backend, (x,), rule, block))


def act_quant(
    x: Tensor, group: int = ACT_GROUP, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """E4M3 codes ``[..., K]`` and E8M0 scales ``[..., ceil(K / group)]`` of x ``[..., K]``.

    All of it: ``act_quant_torch.act_quant``.
    """
    return cast(tuple[Tensor, Tensor], _call("act_quant", backend, (x,), group))


def fp4_act_quant(
    x: Tensor, group: int = FP4_GROUP, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Packed E2M1 codes ``[..., K / 2]`` and E8M0 scales ``[..., ceil(K / group)]`` of x.

    All of it: ``fp4_act_quant_torch.fp4_act_quant``.
    """
    return cast(tuple[Tensor, Tensor], _call("fp4_act_quant", backend, (x,), group))


def block_dequant(
    codes: Tensor,
    scales: Tensor,
    fmt: Format,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The values ``[..., N, K]`` of codes in the block format fmt.

    All of it: ``block_dequant_torch.block_dequant``.
    """
    return cast(Tensor, _call("block_dequant", backend, (codes, scales), fmt, dtype))


def hadamard(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``x @ H * D**-0.5`` over the last axis. All of it: ``hadamard_torch.hadamard``."""
    return cast(Tensor, _call("hadamard", backend, (x,)))


def ordered_gemm(
    x: Tensor, w: Tensor, block: int | None = BLOCK, *, backend: Backend | None = None
) -> Tensor:
    """``x @ w.T`` ``[M, N]`` of float32 matrices, the same bits on every machine.

    All of it: ``ordered_gemm_torch.ordered_gemm``.
    """
    return cast(Tensor, _call("ordered_gemm", backend, (x, w), block))


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP8,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``x @ weight.T`` ``[..., N]`` of act_quant's results and an FP8 weight ``[N, K]``.

    All of it: ``fp8_gemm_torch.fp8_gemm``.
    """
    operands = (x, x_scales, weight, weight_scales)
    return cast(Tensor, _call("fp8_gemm", backend, operands, fmt, group, dtype))


def fp4_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    fmt: Format = FP4,
    group: int = ACT_GROUP,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``x @ weight.T`` ``[..., N]`` of act_quant's results and an FP4 weight ``[N, K]``.

    All of it: ``fp4_gemm_torch.fp4_gemm``.
    """
    operands = (x, x_scales, weight, weight_scales)
    return cast(Tensor, _call("fp4_gemm", backend, operands, fmt, group, dtype))


def sparse_attn(
    q: Tensor,
    kv: Tensor,
    attn_sink: Tensor,
    indices: Tensor,
    softmax_scale: float,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of q ``[B, S, H, D]`` to the rows of kv ``[B, N, D]`` that indices list.

    All of it: ``sparse_attn_torch.sparse_attn``.
    """
    operands = (q, kv, attn_sink, indices)
    return cast(Tensor, _call("sparse_attn", backend, operands, softmax_scale))


def hc_split_sinkhorn(
    mixes: Tensor,
    scale: Tensor,
    base: Tensor,
    hc: int = 4,
    iters: int = 20,
    eps: float = 1e-6,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """pre ``[..., hc]``, post ``[..., hc]`` and comb ``[..., hc, hc]`` from mixes.

    All of it: ``hc_split_sinkhorn_torch.hc_split_sinkhorn``.
    """
    operands = (mixes, scale, base)
    result = _call("hc_split_sinkhorn", backend, operands, hc, iters, eps)
    return cast(tuple[Tensor, Tensor, Tensor], result)
