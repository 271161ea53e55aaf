"""Weights that a forward pass may use without showing them: their values are digested themselves.

A gate's bias and an indexer only decide who takes part; a change that turns no decision for these
prompts leaves every number as it was. Of the embedding and of the table of expert ids only the rows
of tokens that occur are read. All of them together are small, and their value digests
(``checkpoint.digest``) are the same on every machine and in every format.
"""

from __future__ import annotations

from dsv4_quant.catalogue import TensorSpec
from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.checkpoint.digest import model_digest
from dsv4_quant.checkpoint.digesting import digest_tensors
from dsv4_quant.progress import NoProgress, Progress
from dsv4_quant.team import Team

HIDDEN = ("gate.bias", "gate.tid2eid", "attn.indexer.", "embed.weight")
"""What the names of such weights hold."""


def tables(
    ckpt: Checkpoint,
    *,
    mtp: bool,
    threads: int | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> dict[str, str]:
    """Group -> digest of its values, 32 hex digits; a group is a layer's prefix or ``embed``.

    Args:
        mtp: whether the MTP block is one of the groups.

    Raises NotANumberError that names the weight.
    """
    progress = progress or NoProgress()
    progress.stage("digest of tables")
    groups = {
        spec.name: group_of(spec)
        for spec in ckpt.specs.values()
        if any(part in spec.name for part in HIDDEN)
        and (mtp or spec.layer is None or spec.layer < ckpt.config.num_hidden_layers)
    }
    digests = digest_tensors(ckpt, groups, workers=threads, progress=progress, team=team)
    return {
        group: model_digest({name: digests[name] for name in groups if groups[name] == group})[:32]
        for group in dict.fromkeys(groups.values())
    }


def group_of(spec: TensorSpec) -> str:
    """``layers.3`` of layers.3.ffn.gate.bias, ``embed`` of embed.weight."""
    first, second, *_ = spec.name.split(".")
    return first if spec.layer is None else f"{first}.{second}"


def tables_of(ckpt: Checkpoint, group: str) -> list[str]:
    """The names of a group's weights."""
    return [
        spec.name
        for spec in ckpt.specs.values()
        if any(part in spec.name for part in HIDDEN) and group_of(spec) == group
    ]
