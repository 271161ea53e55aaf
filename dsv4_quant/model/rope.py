"""Rotary position embedding on the last dims of a vector, and YaRN.

t positions, c rotated dims (qk_rope_head_dim), taken as pairs (2i, 2i + 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig, RopeScaling


class Rope:
    """The rotations of every position up to a length.

    Layers without compression rotate by ``rope_theta``; layers with compression, their compressor
    and their indexer by ``compress_rope_theta``, stretched by YaRN. YaRN's attention factor is not
    applied in this model.
    """

    def __init__(self, config: ModelConfig, *, compressed: bool, length: int) -> None:
        self.dim = config.qk_rope_head_dim
        base = config.compress_rope_theta if compressed else config.rope_theta
        speeds = 1 / base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        if compressed and config.rope_scaling is not None:
            speeds = yarn(speeds, base, config.rope_scaling)
        # The published code takes the product in float32. Its cosine is taken in float64 here.
        angles = torch.arange(length, dtype=torch.float32)[:, None] * speeds  # [length, c / 2]
        self._cos, self._sin = angles.double().cos().float(), angles.double().sin().float()

    def __call__(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotates the last c dims of x ``[t, ..., h]`` by the angles of positions ``[t]``."""
        shape = (len(positions), *[1] * (x.dim() - 2), self.dim // 2)
        cos, sin = self._cos[positions].view(shape), self._sin[positions].view(shape)
        if inverse:
            sin = -sin
        plain, rotated = x[..., : -self.dim], x[..., -self.dim :]
        even, odd = rotated[..., 0::2], rotated[..., 1::2]  # [t, ..., c / 2]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        return torch.cat((plain, turned.flatten(-2)), -1)


def yarn(speeds: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): slow rotations are slowed down by ``factor``.

    A dim that turns more than ``beta_fast`` times within the original length keeps its speed, one
    that turns less than ``beta_slow`` times is divided by ``factor``, in between is a ramp.
    """
    dim = 2 * len(speeds)

    def dim_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), dim - 1)
    width = high - low or 0.001  # no ramp: a step
    ramp = (torch.arange(len(speeds), dtype=torch.float32) - low) / width
    keep = 1 - ramp.clamp(0, 1)
    return speeds / scaling.factor * (1 - keep) + speeds * keep
