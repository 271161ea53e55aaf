"""What one changed byte does: a few hundred random ones in every kind of tensor.

``DETECTION.md`` and ``detection.json`` beside this file are written by ``DSV4_UPDATE=1 pytest ...``
(some minutes). On every run the two are compared with each other, what must be found is demanded
of them, and a sample of the changes is made again.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.errors import NotANumberError, UnreadableError
from dsv4_quant.fingerprints.compare import compare
from dsv4_quant.fingerprints.document import Fingerprint
from dsv4_quant.fingerprints.gates import begins, broken
from dsv4_quant.fingerprints.record import Recording, record
from dsv4_quant.fingerprints.suspects import suspects
from dsv4_quant.fingerprints.tables import tables_of
from dsv4_quant.formats.blocks import Tensor
from tests.fingerprints.damage import Altered, Flip

TABLE = Path(__file__).with_name("DETECTION.md")
CASES = Path(__file__).with_name("detection.json")
EACH = 24

KINDS = {
    "experts, FP4 codes": (".ffn.experts.", False),
    "experts, scales": (".ffn.experts.", True),
    "shared experts, FP8 codes": (".shared_experts.", False),
    "shared experts, scales": (".shared_experts.", True),
    "attention, FP8 codes": ((".attn.wq_", ".attn.wkv", ".attn.wo_"), False),
    "attention, scales": ((".attn.wq_", ".attn.wkv", ".attn.wo_"), True),
    "attention sinks": ("attn_sink", False),
    "compressor": (".attn.compressor.", False),
    "indexer": (".attn.indexer.", False),
    "norms": ("norm.weight", False),
    "hyper-connections": ("hc_", False),
    "gate, weight": ("gate.weight", False),
    "gate, bias": ("gate.bias", False),
    "gate, expert ids": ("gate.tid2eid", False),
    "MTP projections": (("e_proj", "h_proj"), False),
    "embedding": ("embed.weight", False),
    "head": ("head.weight", False),
}
"""Kind -> what its names hold, and whether scales are meant."""


INTRODUCTION = """\
# What a fingerprint finds

Written by `test_detection.py` (`DSV4_UPDATE=1`). Random single bytes of the golden checkpoint
`tiny-fp4`, {count} in all, each flipped by a random mask; the fingerprint is that of the prompts
that are chosen by default.

- **changed**: the value of a weight became another one (FP4 code 8 is -0, for one, and no other
  value than 0).
- **bit**: of those, how many the exact bit gate found.
- **named**: of those found, how many are among the tensors that the report says to look at; **of**:
  how many tensors it names (median).
- **numeric**: how many of the changed ones the gate between machines found: it cannot tell a small
  change of a number from rounding."""


@dataclass(frozen=True)
class Case:
    """One change and what came of it."""

    kind: str
    name: str
    is_scale: bool
    byte: int
    mask: int
    changed: bool
    """Whether any value of the weight is another one; -0 is no other value than 0."""
    bit: bool
    """Whether the bit gate found it."""
    named: bool
    """Whether the weight was among the suspects."""
    suspects: int
    numeric: bool
    """Whether the numeric gate found it."""

    @property
    def flip(self) -> Flip:
        return Flip(self.name, self.is_scale, self.byte, self.mask)


def flips(ckpt: Checkpoint) -> Iterator[tuple[str, Flip]]:
    """EACH random changes of a byte, for every kind."""
    draw = random.Random(4)
    for kind, (part, is_scale) in KINDS.items():
        parts = (part,) if isinstance(part, str) else part
        specs = [
            spec
            for spec in ckpt.specs.values()
            if any(p in spec.name for p in parts) and (spec.format.is_quantised or not is_scale)
        ]
        for _ in range(EACH):
            spec = draw.choice(specs)
            held = ckpt.read(spec.name)
            array = held.scales if is_scale else held.codes
            assert array is not None
            byte, mask = draw.randrange(array.nbytes), draw.randrange(1, 256)
            yield kind, Flip(spec.name, is_scale, byte, mask)


def run(ckpt: Checkpoint, recorded: Fingerprint, kind: str, flip: Flip) -> Case:
    """Makes the change and judges."""
    held = ckpt.read(flip.name)
    changed = not same_values(held, flip(flip.name, held))
    altered = Altered(ckpt, flip)
    try:
        fresh = record(altered, recorded.script, threads=1)
    except (NotANumberError, UnreadableError) as refused:  # or an expert id that cannot be
        count = int(refused.tensor is not None)
        return Case(
            kind, **asdict(flip), changed=changed,
            bit=True, named=refused.tensor == flip.name, suspects=count, numeric=True,
        )  # fmt: skip
    found = compare(recorded, fresh)
    bit, numeric = bool(broken(found, "bit")), bool(broken(found, "numeric"))
    names = [name for group in found.tables for name in tables_of(altered, group)]
    if (step := begins(found, "bit")) is not None:
        assert fresh.fingerprint.measured is not None
        hit = () if step.layer is None else fresh.fingerprint.measured.experts_hit[step.layer]
        names += suspects(altered, step.layer, step.part, step.rows, hit)
    named, count = flip.name in names, len(set(names))
    return Case(
        kind, **asdict(flip), changed=changed,
        bit=bit, named=named, suspects=count, numeric=numeric,
    )  # fmt: skip


def same_values(one: Tensor, other: Tensor) -> bool:
    if one.format.kind == "i64":
        return np.array_equal(one.codes, other.codes)
    return np.array_equal(one.decode(), other.decode())


@pytest.fixture(scope="module")
def recorded(recording: Recording) -> Fingerprint:
    return recording.fingerprint


@pytest.fixture(scope="module")
def cases(ckpt: Checkpoint, recorded: Fingerprint) -> list[Case]:
    if os.environ.get("DSV4_UPDATE"):
        found = [run(ckpt, recorded, kind, flip) for kind, flip in flips(ckpt)]
        CASES.write_text("[\n" + ",\n".join(json.dumps(asdict(case)) for case in found) + "\n]\n")
        TABLE.write_text(table(found))
    return [Case(**case) for case in json.loads(CASES.read_text())]


def table(cases: list[Case]) -> str:
    """DETECTION.md."""
    lines = [
        *INTRODUCTION.format(count=len(cases)).splitlines(),
        "",
        "| kind | tried | changed | bit | named | of | numeric |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        lines.append(row(kind, [case for case in cases if case.kind == kind]))
    lines.append(row("**all**", cases))
    return "\n".join(lines) + "\n"


def row(kind: str, cases: list[Case]) -> str:
    changed = [case for case in cases if case.changed]
    found = [case for case in changed if case.bit]
    told = [case for case in found if case.suspects]
    named = sum(case.named for case in told)
    of = f"{median(case.suspects for case in told):.0f}" if told else ""
    numeric = sum(case.numeric for case in changed)
    cells = [len(cases), len(changed), share(len(found), len(changed)), share(named, len(told))]
    return f"| {kind} | {' | '.join(map(str, cells))} | {of} | {share(numeric, len(changed))} |"


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f} %)" if whole else "0"


def test_the_table_is_that_of_the_cases(cases: list[Case]) -> None:
    assert TABLE.read_text() == table(cases)
    assert len(cases) == EACH * len(KINDS)
    assert not [case for case in cases if case.bit and not case.changed]


def test_every_changed_code_of_an_expert_is_found(cases: list[Case]) -> None:
    for kind in ("experts, FP4 codes", "experts, scales", "shared experts, FP8 codes"):
        changed = [case for case in cases if case.kind == kind and case.changed]
        assert len(changed) > EACH // 2
        assert all(case.bit and case.named for case in changed if case.suspects), kind
        assert all(case.bit for case in changed), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_comes_out_as_it_is_written(
    kind: str, ckpt: Checkpoint, recorded: Fingerprint, cases: list[Case]
) -> None:
    known = next(case for case in cases if case.kind == kind and case.changed)
    again = run(ckpt, recorded, kind, known.flip)
    assert (again.changed, again.bit, again.named) == (known.changed, known.bit, known.named)
