"""The two arithmetics: what is rounded, and where.

exact      float32 throughout, weights decoded exactly, nothing else rounded. Weights are judged
           with this one.
deployed   what the published kernels do: the input of a linear with FP8 or FP4 weights is rounded
           to FP8, keys to FP8, the indexer's queries and keys to FP4.

Either runs with float32 or bfloat16 activations. Tensors are float32 in both cases; bfloat16 means
that results are rounded to what bfloat16 can hold wherever the published code stores them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import FP4, Format
from dsv4_quant.formats.blocks import Tensor as Weight
from dsv4_quant.kernels.ops import act_quant, block_dequant, fp4_act_quant
from dsv4_quant.model.dot import BLOCK
from dsv4_quant.model.linear import Products

LINEAR_GROUP = 128
"""Values along K that share a scale in the input of a linear."""

KEY_GROUP = 64
"""Values of a key that share a scale."""


@dataclass(frozen=True)
class Arithmetic:
    """How numbers are rounded, and what multiplies them."""

    deployed: bool
    bfloat16: bool
    products: Products

    def round(self, x: Tensor) -> Tensor:
        """A result as it is stored: itself, or the nearest bfloat16 values."""
        return x.bfloat16().float() if self.bfloat16 else x

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        rows: tuple[int, int] | None = None,
        *,
        quantise: bool = True,
    ) -> Tensor:
        """``x @ weight.T``, ``[..., K]`` -> ``[..., N]``, the result stored.

        Args:
            rows: use only these rows of the weight.
            quantise: whether ``deployed`` rounds x to FP8 if the weight is FP8 or FP4.
        """
        if self.deployed and quantise and weight.format.is_quantised:
            x = _to_fp8_and_back(x, LINEAR_GROUP)
        return self.round(self.products.linear(x, weight, rows))

    def linear_float32(self, x: Tensor, weight: Weight, block: int | None = BLOCK) -> Tensor:
        """``x @ weight.T`` that both arithmetics compute and keep in float32."""
        return self.products.linear(x, weight, block=block)

    def store_key(self, key: Tensor, rope_dim: int) -> Tensor:
        """Keys ``[..., h]`` as they are cached: ``deployed`` rounds all but the rope dims."""
        if not self.deployed:
            return key
        plain, rotated = key[..., :-rope_dim], key[..., -rope_dim:]
        return torch.cat((self.round(_to_fp8_and_back(plain, KEY_GROUP)), rotated), -1)

    def store_index(self, x: Tensor) -> Tensor:
        """The indexer's queries or keys ``[..., j]``: ``deployed`` rounds them to FP4."""
        if not self.deployed:
            return x
        codes, scales = fp4_act_quant(x, backend="torch")
        return block_dequant(codes, scales, FP4, torch.float32, backend="torch")


def _to_fp8_and_back(x: Tensor, group: int) -> Tensor:
    if not x.shape[-1]:
        return x
    codes, scales = act_quant(x, group, backend="torch")
    rows = Format("fp8", (1, group), "e8m0")
    return block_dequant(codes, scales, rows, torch.float32, backend="torch")
