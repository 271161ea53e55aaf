"""Who watches a forward pass: what happens in every layer, as it happens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Part = Literal["attn", "ffn"]


class Observer:
    """Subclass it and override what you want to see. Tensors are not to be kept or changed.

    layer counts through the MTP block: there it is ``num_hidden_layers``.
    """

    def streams(self, layer: int, part: Part, prompt: int, h: Tensor) -> None:
        """A prompt's streams ``[t, s, d]`` after a sub-layer."""

    def routed(self, layer: int, prompt: int, experts: Tensor) -> None:
        """The experts ``[t, k]`` that a prompt's tokens go to."""

    def finished(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps are behind; a step is a layer, the head or the MTP block."""
