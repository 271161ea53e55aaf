"""The detection matrix: what is found of every kind of damage, at which level, under which name.

``DETECTION.md`` beside this file is written by this test (``DSV4_UPDATE=1 pytest ...``), and
compared with what is found on every run. What must be found stands in ``damages.py``: an update
cannot make a miss look meant.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.validators.report import LEVELS, Finding, Report
from dsv4_quant.validators.verify import verify
from tests.folders import edited_json, golden
from tests.validators.conftest import Sound
from tests.validators.damages import ALL, Damage

PUBLISHED = Path(__file__).parent / "DETECTION.md"


@dataclass(frozen=True)
class Outcome:
    """What two runs said: with the manifest, and without it but next to the undamaged one."""

    pinned: Report
    bare: Report

    def found(self, pinned: bool) -> list[Finding]:
        """Findings about the folder itself; that it has no manifest is none of them."""
        said = (self.pinned if pinned else self.bare).findings
        return [f for f in said if f.check != "against" and (pinned or f.check != "manifest")]

    def against(self) -> set[str]:
        """What the comparison names."""
        said = (f for f in self.bare.findings if f.check == "against")
        return {f.tensor or str(f.file) for f in said}


def copy_small_files(source: str, target: str) -> None:
    """Weights are linked: whoever edits nothing but JSON need not copy them."""
    copy = os.link if source.endswith(".safetensors") else shutil.copy2
    copy(source, target)


Judge = Callable[[Damage], Outcome]


@pytest.fixture(scope="module")
def judge(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Damages a copy of a sound checkpoint and verifies it, once per damage."""
    known: dict[str, Outcome] = {}

    def run(damage: Damage) -> Outcome:
        if damage.kind not in known:
            root = tmp_path_factory.mktemp("damaged") / "checkpoint"
            copy = copy_small_files if damage.kind in LIES else shutil.copy2
            shutil.copytree(sound(damage.source), root, copy_function=copy)
            damage.do(root)
            pinned = verify(root, workers=2)
            for name in ("dsv4-manifest.json", "SHA256SUMS"):
                (root / name).unlink(missing_ok=True)
            source = "base" if damage.source == "base" else "fp4"
            bare = verify(root, against=sound(source), workers=2)
            shutil.rmtree(root)
            known[damage.kind] = Outcome(pinned, bare)
        return known[damage.kind]

    return run


def first(findings: Iterable[Finding]) -> str | None:
    """The cheapest level among them."""
    return min((f.level for f in findings), key=LEVELS.index, default=None)


def names(findings: Iterable[Finding], level: str | None) -> set[str | None]:
    """Tensors and files that a level names."""
    return {name for f in findings if f.level == level for name in (f.tensor, f.file)}


@pytest.mark.parametrize("damage", ALL, ids=lambda damage: damage.kind)
def test_damage_is_found_and_named(damage: Damage, judge: Judge) -> None:
    outcome = judge(damage)
    bare, pinned = outcome.found(pinned=False), outcome.found(pinned=True)
    assert (first(bare), first(pinned)) == (damage.bare, damage.pinned)
    if bare:
        assert damage.named in names(bare, damage.bare)
    everything = {name for f in pinned for name in (f.tensor, f.file)}
    assert damage.named in everything
    if damage.bare != "structure":
        assert outcome.against() == set(damage.against)


@pytest.mark.parametrize("source", ["fp4", "base", "mp"])
def test_nothing_is_found_in_a_sound_checkpoint(source: str, sound: Sound) -> None:
    against = sound("base" if source == "base" else "fp4")
    assert verify(sound(source), against=against, workers=2).findings == ()


def other(value: Any) -> Any:
    """Another value of the same kind, one that a config could well have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 if value else 1
    if isinstance(value, str):
        return {"fp4": "fp8", "sqrtsoftplus": "sigmoid"}.get(value, f"{value}x")
    if isinstance(value, list):
        return [*value[:1], other(value[1]), *value[2:]] if len(value) > 1 else ["Other"]
    return None


MEANINGLESS = frozenset((
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range",
    "max_position_embeddings", "torch_dtype", "transformers_version", "use_cache",
))  # fmt: skip
"""Keys that say nothing about weights or arithmetic."""


NAMED_AS = {"num_hidden_layers": "compress_ratios", "num_nextn_predict_layers": "compress_ratios"}
"""Fields whose lie shows as a contradiction with something else."""


def config_fields() -> list[tuple[str, ...]]:
    """Every key of config.json, and those inside its objects."""
    config = json.loads((golden("tiny-fp4") / "config.json").read_bytes())
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        found += [(key, inner) for inner in value] if isinstance(value, dict) else [(key,)]
    return found


def lie(*path: str) -> Callable[[Path], None]:
    """config.json with another value for one key."""

    def do(root: Path) -> None:
        with edited_json(root / "config.json") as value:
            for key in path[:-1]:
                value = value[key]
            value[path[-1]] = other(value[path[-1]])

    return do


def field_damage(field: tuple[str, ...]) -> Damage:
    """A lie in one config field; its name is what must be found."""
    return Damage(".".join(field), lie(*field), None, "checksums", "config.json")


LIES = {".".join(field) for field in config_fields()}


@pytest.mark.parametrize("field", config_fields(), ids=".".join)
def test_a_lie_in_a_config_field_is_found(field: tuple[str, ...], judge: Judge) -> None:
    outcome = judge(field_damage(field))
    assert first(outcome.found(pinned=True)) in ("structure", "checksums")
    said = [f for f in outcome.bare.findings if f.check in ("config", "against")]
    if field[0] in MEANINGLESS:
        assert said == []
        return
    assert first(said) == "structure", "inference/config.json or the tensors say otherwise"
    told = " ".join(f"{f.expected} {f.found} {f.tensor}" for f in said)
    assert NAMED_AS.get(field[-1], field[-1]) in told or field[0] in told


def test_the_published_table_is_true(judge: Judge, sound: Sound) -> None:
    text = table(judge, sound)
    if os.environ.get("DSV4_UPDATE") == "1":
        PUBLISHED.write_text(text)
    assert PUBLISHED.read_text() == text, "run this test with DSV4_UPDATE=1, and read the change"


def table(judge: Judge, sound: Sound) -> str:
    """DETECTION.md."""
    lines = [HEAD, cost(verify(sound("fp4"), against=sound("fp4"), workers=2))]
    lines += ["", "## Damage", "", *ROWS]
    for damage in ALL:
        outcome = judge(damage)
        bare, pinned = outcome.found(pinned=False), outcome.found(pinned=True)
        against = "yes" if outcome.against() else "no"
        if damage.bare == "structure":
            against = "-"
        is_of_manifest = "manifest" in damage.kind or "SHA256SUMS" in damage.kind
        said = "-" if is_of_manifest else shown(bare)
        against = "-" if is_of_manifest else against
        lines.append(f"| {damage.kind} | {said} | {shown(pinned)} | {against} | `{damage.named}` |")
    lines += ["", FIELDS]
    for field in config_fields():
        outcome = judge(field_damage(field))
        bare = [f for f in outcome.found(pinned=False) if f.file != "inference/config.json"]
        flat = [f for f in outcome.found(pinned=False) if f.file == "inference/config.json"]
        seen = "yes" if flat else "no"
        lines.append(f"| `{'.'.join(field)}` | {shown(bare)} | {seen} |"
                     f" {shown(outcome.found(pinned=True))} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def shown(findings: list[Finding]) -> str:
    """The first level that finds it, and whether it only warns."""
    level = first(findings)
    if level is None:
        return "**not found**"
    is_error = any(f.severity == "error" for f in findings if f.level == level)
    return level if is_error else f"{level} (warning)"


def cost(report: Report) -> str:
    """What each level reads of this checkpoint."""
    lines = ["| level | reads | bytes |", "|---|---|---:|"]
    said = {
        "structure": "headers, index, configs",
        "checksums": "every byte of every file",
        "values": "every byte of every weight",
        "against": "every byte of the other checkpoint's weights",
    }
    lines += [f"| {c.level} | {said[c.level]} | {c.bytes:,} |" for c in report.checks]
    return "\n".join(lines)


HEAD = f"""# What is found

Generated by `test_detection.py` from the damages in `damages.py`, each done to a copy of a tiny
sound checkpoint ({len(ALL)} kinds, and every field of config.json). Run with `DSV4_UPDATE=1` to
write it anew.

- **bare**: the first level that finds it in a folder without manifest, such as a fresh download.
- **pinned**: the same in a folder that a conversion or `dsv4-quant manifest` has left, with
  `dsv4-manifest.json` and `SHA256SUMS` from before the damage.
- **named**: the weight or file that is named, by the first level or by one after it: where a file's
  hash is wrong, the values level names the weights.
- **--against**: whether the comparison with the undamaged checkpoint finds it (it reads values,
  config and small files; a rank's copies and the form of storage are no part of it).

Without manifest and without another checkpoint nobody can know that a plausible number is not the
right one: these lines say **not found**.

## Cost

What each level reads of the tiny checkpoint stands below. In CPU seconds, on one core of the
machine of the project's tests (2026-11): structure 50 microseconds per tensor (4 s for
V4-Pro-0813), checksums 0.7 s per GB, values 1.2 s per GB, and --against as much again for the other
checkpoint. Work is spread over all cores, and no level held more than 300 MB.
"""

ROWS = [
    "| damage | bare | pinned | --against | named |",
    "|---|---|---|---|---|",
]

FIELDS = """## config.json, field by field

One field changed, the others as they were. *bare*: what the tensors themselves contradict.
*inference/config.json*: whether that file, where it is there, contradicts.

| field | bare | inference/config.json | pinned |
|---|---|---|---|"""
