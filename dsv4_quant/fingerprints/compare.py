"""A recorded fingerprint against a fresh recording of the same script: what is how far apart.

Everything is measured, whatever the gate; ``gates`` says what of it decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from dsv4_quant.fingerprints.document import Fingerprint, Measured, Spot
from dsv4_quant.fingerprints.record import Floats, Recording, log_sum_exp
from dsv4_quant.fingerprints.script import Script
from dsv4_quant.fingerprints.sketch import ROW_BYTES, Digest, Doubles, distance
from dsv4_quant.fingerprints.suspects import Part, Row
from dsv4_quant.fingerprints.watcher import Routes

CLEAR = 1.0
"""Nats by which the likeliest token must be ahead for its change to say anything."""

ROUNDING = 1e-12
"""Nats that sums in float64 may leave of a divergence of 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the pass, a sub-layer or a head, in both."""

    name: str
    """Such as ``layer 3 ffn``, ``head`` or ``mtp.0 attn``."""
    layer: int | None
    """Counts on through the MTP block; None for the model's own head."""
    part: Part
    is_equal: bool
    """Bit for bit."""
    typical: float
    """Median over the prompts of the distance, as a part of the size."""
    farthest: float
    """The largest over the prompts."""
    rows: tuple[Row, ...] = ()
    """Which positions a difference has reached; none of a head."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far one spot's distributions are apart."""

    prompt: int
    position: int
    same_top: bool | None
    """Whether the likeliest token is the same; None where two are about as likely."""
    kl: float | None
    """Nats; None where only the order is known."""
    logit: float | None
    """The largest difference of a kept logit or the log-sum-exp; None of a served model."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured."""

    spots: tuple[Apart, ...]
    steps: tuple[Step, ...]
    """In the order of the pass; none against what a served model said."""
    tables: tuple[str, ...] = ()
    """Groups of weights whose values differ, of those that the pass may not show."""

    @property
    def is_equal(self) -> bool:
        """Whether there is something to compare bit for bit, and all of it is equal."""
        return bool(self.steps) and not self.tables and all(step.is_equal for step in self.steps)

    @property
    def clear(self) -> int:
        """How many spots have a token that is clearly the likeliest."""
        return sum(spot.same_top is not None for spot in self.spots)

    @property
    def top1(self) -> float | None:
        """Part of those at which it is the same."""
        return (
            sum(spot.same_top or False for spot in self.spots) / self.clear if self.clear else None
        )

    @property
    def kl(self) -> float | None:
        """Mean over the spots."""
        known = [spot.kl for spot in self.spots if spot.kl is not None]
        return sum(known) / len(known) if known else None

    @property
    def logit(self) -> float | None:
        """Median over the spots."""
        known = [spot.logit for spot in self.spots if spot.logit is not None]
        return median(known) if known else None

    def far(self, limit: float) -> float:
        """Part of the spots whose logits differ by more than a limit."""
        return sum((spot.logit or 0) > limit for spot in self.spots) / len(self.spots)


def compare(recorded: Fingerprint, fresh: Recording) -> Comparison:
    """fresh must be a recording of the same script (one without MTP is compared without)."""
    script, measured, mine = recorded.script, recorded.measured, fresh.fingerprint.measured
    assert mine is not None
    apart = [
        _apart(prompt, position, spot, row, is_served=measured is None)
        for prompt, places in enumerate(script.spots)
        for position, spot, row in zip(
            places, recorded.spots[prompt], fresh.logits[prompt], strict=True
        )
    ]
    if measured is None:
        return Comparison(tuple(apart), ())
    common = (group for group in measured.tables if group in mine.tables)
    differ = tuple(group for group in common if measured.tables[group] != mine.tables[group])
    steps = _steps(measured, mine, script, fresh.routes)
    return Comparison(tuple(apart), tuple(steps), differ)


def _apart(prompt: int, position: int, spot: Spot, row: Floats, *, is_served: bool) -> Apart:
    """row: all logits of the fresh pass, ``[vocab_size]``."""
    ids, logits, lse = np.array(spot.ids), np.array(spot.logits), log_sum_exp(row)
    logit = kl = None
    if not is_served:
        logit = max(float(np.abs(row[ids] - logits).max()), abs(lse - spot.lse))
    if spot.logits:
        kl = divergence(logits - spot.lse, row[ids].astype(np.float64) - lse)
    known = logits if len(logits) > 1 else np.sort(row)[-2:][::-1]
    is_clear = len(known) < 2 or known[0] - known[1] >= CLEAR
    same_top = int(row.argmax()) == spot.ids[0] if is_clear else None
    return Apart(prompt, position, same_top, kl, logit)


def divergence(one: Doubles, other: Doubles) -> float:
    """``KL(one || other)`` of some outcomes' log-probabilities, all further ones taken as one more.

    Never more than the divergence of the whole distributions.
    """
    p, q = np.exp(one), np.exp(other)
    rest_p, rest_q = max(1 - p.sum(), 0.0), max(1 - q.sum(), 1e-12)
    total = float((p * (one - other)).sum())
    if rest_p > 0:
        total += float(rest_p * np.log(rest_p / rest_q))
    return total if total > ROUNDING else 0.0


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    layer: int | None
    part: Part
    prompts: tuple[Digest, ...]
    rows: bytes = b""


def _stages(measured: Measured) -> Iterator[_Stage]:
    """The order of the pass: layers, head, MTP block, its head."""
    layers = measured.model["num_hidden_layers"]
    own, drafted = measured.streams[: 2 * layers], measured.streams[2 * layers :]
    for seen in own:
        name = f"layer {seen.layer} {seen.part}"
        yield _Stage(name, seen.layer, seen.part, seen.prompts, seen.rows)
    yield _Stage("head", None, "head", measured.logits)
    for seen in drafted:
        yield _Stage(f"mtp.0 {seen.part}", seen.layer, seen.part, seen.prompts, seen.rows)
    if drafted:
        yield _Stage("mtp.0 head", layers, "head", measured.mtp_logits)


def _steps(theirs: Measured, mine: Measured, script: Script, routes: Routes) -> Iterator[Step]:
    for one, other in zip(_stages(theirs), _stages(mine), strict=False):
        apart = [distance([a], [b]) for a, b in zip(one.prompts, other.prompts, strict=True)]
        yield Step(
            name=one.name,
            layer=one.layer,
            part=one.part,
            is_equal=[d.hash for d in one.prompts] == [d.hash for d in other.prompts],
            typical=median(apart),
            farthest=max(apart),
            rows=tuple(_rows(one, other, script, routes)),
        )


def _rows(one: _Stage, other: _Stage, script: Script, routes: Routes) -> Iterator[Row]:
    if one.part == "head" or one.layer is None:
        return
    places = [(prompt, place) for prompt, rows in enumerate(script.rows) for place in rows]
    experts = np.concatenate(routes[one.layer]).tolist() if places else []
    for i, (prompt, position) in enumerate(places):
        part = slice(i * ROW_BYTES, (i + 1) * ROW_BYTES)
        yield Row(prompt, position, one.rows[part] != other.rows[part], tuple(experts[i]))
