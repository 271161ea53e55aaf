"""Who watches a forward pass: what happens in every layer, as it happens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Part = Literal["attn", "ffn"]


class Observer:
    """Subclass it and override what you want to see. Tensors are not to be kept or changed.

    layer counts through the MTP block: there it is ``num_hidden_layers``.
    """

    def note(self, text: str) -> None:
        """Something to know about the pass."""

    def streams(self, layer: int, part: Part, prompt: int, h: Tensor) -> None:
        """A prompt's streams ``[t, s, d]`` after a sub-layer."""

    def routed(self, layer: int, prompt: int, experts: Tensor) -> None:
        """The experts ``[t, k]`` that a prompt's tokens go to."""

    def expert_inputs(
        self, layer: int, expert: int, rows: Tensor, given: Tensor, hidden: Tensor
    ) -> None:
        """What one expert's matrices are given: w1 and w3 ``[t, d]``, w2 ``[t, f]``.

        rows ``[t]``: which token each comes from, counted through all prompts one after the other;
        in no order.
        """

    def logits(self, prompt: int, first: int, rows: Tensor, *, mtp: bool) -> None:
        """Logits ``[t, v]`` of a prompt's positions from ``first`` on; ``mtp``: of the MTP block.

        A prompt's come in the order of its positions.
        """

    def read(self, count: int) -> None:
        """So many bytes of weights were read since the pass began; told before ``finished``."""

    def finished(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps are behind; a step is a layer, the MTP block or the head."""
