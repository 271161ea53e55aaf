"""Every kernel compiles for a GPU, although none is here: the interpreter accepts more than the
compiler does. The launches are real, down to machine code; only the last step is left out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = r"""
import re
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv4_quant.formats.blocks import FP4, fp8
from dsv4_quant.formats.rules import ScaleRule
from dsv4_quant.kernels import ops


class PaperDriver:
    "An NVIDIA GPU of compute capability 9.0, as far as a compiler asks."

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.metadata.shared <= 99 << 10, "more shared memory than every GPU since 8.6 has"
    assert ".ftz" not in kernel.asm["ptx"], "flushes subnormals"
    if "ordered" in self.fn.__name__:
        keeps_the_order(kernel.asm["ptx"], kwargs["M"] * kwargs["N"] * kwargs["LANES"] // 128)
    print(self.fn.__name__, len(kernel.asm["cubin"]))


def keeps_the_order(ptx, sums):
    "A fused multiply-add for each of a thread's sums; lanes and blocks are added apart from them."
    used = Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)", ptx, re.M))
    floats = {name for name in used if "f32" in name or "mma" in name or "tf32" in name}
    assert floats <= {"fma.rn.f32", "add.rn.f32", "add.f32"}, floats
    assert used["fma.rn.f32"] == sums, used
    assert used["add.rn.f32"] + used["add.f32"] >= sums // 16 * 4 + sums // 16, used


launch, JITFunction.run = JITFunction.run, compile_only
driver.set_active(PaperDriver())
ops.choose_backend = lambda backend, *operands: "triton"

packed = torch.zeros(2, 256, 256, dtype=torch.uint8)
scales = torch.zeros(2, 256, 16, dtype=torch.uint8)
ops.fp4_to_fp8(packed, scales)
ops.fp4_to_bf16(packed, scales)
for tile_scales in (torch.zeros(2, 2, 4, dtype=torch.uint8), torch.zeros(2, 2, 4)):
    ops.fp8_to_bf16(torch.zeros(2, 256, 512, dtype=torch.uint8), tile_scales)
for dtype in (torch.bfloat16, torch.float32):
    for rule in ScaleRule:
        ops.quantise_fp4(torch.zeros(2, 256, 512, dtype=dtype), rule)
        ops.quantise_fp8(torch.zeros(2, 256, 512, dtype=dtype), rule)
    x = torch.zeros(64, 512, dtype=dtype)
    codes, scales = ops.act_quant(x)
    ops.fp4_act_quant(x)
    ops.hadamard(x[:, :128])
    q, kv = torch.zeros(1, 2, 64, 512, dtype=dtype), torch.zeros(1, 9, 512, dtype=dtype)
    ops.sparse_attn(q, kv, torch.zeros(64), torch.zeros(1, 2, 640, dtype=torch.int32), 1.0)
for fmt, gemm in ((fp8((128, 128)), ops.fp8_gemm), (FP4, ops.fp4_gemm)):
    weight = torch.zeros(256, 512 // (2 if fmt is FP4 else 1), dtype=torch.uint8)
    weight_scales = torch.zeros(fmt.scale_shape((256, 512)), dtype=torch.uint8)
    ops.block_dequant(weight, weight_scales, fmt)
    gemm(codes, scales, weight, weight_scales, fmt)
fmt = fp8((128, 128), "f32")
ops.block_dequant(torch.zeros(256, 512, dtype=torch.uint8), torch.zeros(2, 4), fmt, torch.float32)
ops.hc_split_sinkhorn(torch.zeros(64, 24), torch.zeros(3), torch.zeros(24))
for rows, cols, block in ((64, 1040, 1024), (64, 1040, None), (1, 512, 1024), (9, 33, 16)):
    ops.ordered_gemm(torch.zeros(rows, cols), torch.zeros(64, cols), block)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile and run")
def test_every_kernel_compiles(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    compiled = {line.split()[0] for line in run.stdout.splitlines()}
    assert compiled == {
        "_fp4_to_fp8_kernel",
        "_fp4_to_bf16_kernel",
        "_fp8_to_bf16_kernel",
        "_quantise_blocks_kernel",
        "_act_quant_kernel",
        "_fp4_act_quant_kernel",
        "_block_dequant_kernel",
        "_hadamard_kernel",
        "_ordered_gemm_kernel",
        "_scaled_matmul_kernel",
        "_sparse_attn_kernel",
        "_hc_split_sinkhorn_kernel",
    }
