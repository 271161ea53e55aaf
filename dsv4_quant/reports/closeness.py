"""What a fingerprint comparison says of a requantised checkpoint: the gate's verdict, per prompt.

Plain figures, so that a page needs neither the comparison's module nor the forward pass behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_quant.fingerprints.compare import Comparison
    from dsv4_quant.fingerprints.gates import Gate


@dataclass(frozen=True, slots=True)
class Prompt:
    """The spots of one prompt."""

    spots: int
    clear: int
    """Spots with a token that is clearly the likeliest."""
    same: int
    """Those of them at which it stayed the likeliest."""
    kl: float | None
    """Mean KL divergence in nats; None where only the order is known."""
    worst_kl: float | None


@dataclass(frozen=True, slots=True)
class Closeness:
    """The gate, its demands and what was measured."""

    gate: str
    why: str
    broken: tuple[str, ...]
    """Demands that are not met, in words."""
    kl: float | None
    """Mean over the spots in nats."""
    top1: float | None
    """Part of the clear spots at which the likeliest token is the same."""
    clear: int
    kl_limit: float
    """What the lossy gate allows."""
    top1_limit: float
    """What the lossy gate demands."""
    prompts: tuple[Prompt, ...]

    @property
    def holds(self) -> bool:
        """Whether every demand of the gate is met."""
        return not self.broken


def closeness(found: Comparison, gate: Gate, why: str) -> Closeness:
    """Of a comparison and the gate that ``choose_gate`` chose, with its reason."""
    from dsv4_quant.fingerprints.gates import LOSSY_KL, LOSSY_TOP1, broken  # imports torch

    count = max((spot.prompt for spot in found.spots), default=-1) + 1
    return Closeness(
        gate=gate,
        why=why,
        broken=tuple(broken(found, gate)),
        kl=found.kl,
        top1=found.top1,
        clear=found.clear,
        kl_limit=LOSSY_KL,
        top1_limit=LOSSY_TOP1,
        prompts=tuple(_prompt(found, prompt) for prompt in range(count)),
    )


def _prompt(found: Comparison, prompt: int) -> Prompt:
    spots = [spot for spot in found.spots if spot.prompt == prompt]
    kls = [spot.kl for spot in spots if spot.kl is not None]
    tops = [spot.same_top for spot in spots if spot.same_top is not None]
    return Prompt(
        spots=len(spots),
        clear=len(tops),
        same=sum(tops),
        kl=sum(kls) / len(kls) if kls else None,
        worst_kl=max(kls, default=None),
    )
