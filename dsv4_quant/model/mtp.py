"""The multi-token-prediction block of the April releases: one more layer, with a head of its own.

It sees the model's last streams and the tokens once more. The DSpark releases hold a drafter of
another kind in its place, which this package does not compute.

t positions, d hidden_size, s hc_mult streams.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.model.arithmetic import Arithmetic
from dsv4_quant.model.functions import rms_norm
from dsv4_quant.model.weights import Weights


def check_mtp(config: ModelConfig) -> None:
    """Raises UsageError unless the checkpoint has one MTP block of the April kind."""
    if config.is_dspark:
        raise UsageError(
            "This release has a DSpark drafter in the place of the MTP block, and its forward pass"
            " is not described",
            hint="Run the forward pass without MTP.",
        )
    if config.num_mtp_blocks != 1:
        raise UsageError(
            f"The forward pass is described for one MTP block, this checkpoint has"
            f" {config.num_mtp_blocks}",
            hint="Run the forward pass without MTP.",
        )


def mtp_streams(
    h: Tensor, embedded: Tensor, weights: Weights, config: ModelConfig, a: Arithmetic
) -> Tensor:
    """The block's input: ``e_proj(enorm(embed))``, added to every ``h_proj(hnorm(stream))``.

    Args:
        h: the model's last streams ``[t, s, d]``.
        embedded: the tokens' embeddings ``[t, d]``.
        weights: the tensors under ``mtp.0.``.

    Returns:
        ``[t, s, d]``.
    """
    eps = config.rms_norm_eps
    e = a.round(rms_norm(embedded, weights.vector("enorm.weight"), eps))
    e = a.linear(e, weights.matrix("e_proj.weight"))  # [t, d]
    h = a.round(rms_norm(h, weights.vector("hnorm.weight"), eps))  # [t, s, d]
    h = a.linear(h, weights.matrix("h_proj.weight"))
    return a.round(e[:, None] + h)
