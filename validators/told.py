"""What the tensors themselves say of the config: a field that lies is named, not its consequences.

One wrong size in a config makes every tensor of that size look wrong. So each axis of each tensor
votes for the config field that its place in the catalogue's table stands for, and where the
majority says another number than the config, it is the config that is accused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from dsv4_quant.catalogue import (
    BLOCK,
    COMPRESSED,
    DSPARK_FIRST,
    DSPARK_LAST,
    EXPERT,
    HASH_ROUTED,
    INDEXED,
    MTP_APRIL,
    SCORED,
    TOP_FIRST,
    TOP_LAST,
    Row,
)
from dsv4_quant.validators.report import Finding, error
from dsv4_quant.validators.subject import Subject

_PLACE = re.compile(r"(layers|mtp)\.([0-9]{1,6})\.(?:ffn\.experts\.([0-9]{1,6})\.)?")

_ROWS: dict[str, Row] = {
    row.name: row
    for table in (TOP_FIRST, TOP_LAST, BLOCK, EXPERT, HASH_ROUTED, SCORED, COMPRESSED, INDEXED,
                  MTP_APRIL, DSPARK_FIRST, DSPARK_LAST)
    for row in table
}  # fmt: skip
"""By the name inside a block or an expert."""

_FIELDS = {
    "v": "vocab_size",
    "d": "hidden_size",
    "f": "moe_intermediate_size",
    "e": "n_routed_experts",
    "k": "num_experts_per_tok",
    "n": "num_attention_heads",
    "h": "head_dim",
    "q": "q_lora_rank",
    "i": "index_n_heads",
    "j": "index_head_dim",
    "s": "hc_mult",
    "y": "dspark_markov_rank",
}
"""The catalogue's letters that are a config field as it is."""

_KEYS = {"num_mtp_blocks": "number of mtp blocks"}
"""What a user finds in the file."""

_OF_RATIO = {row.name for row in (*COMPRESSED, *INDEXED)}

Votes = dict[str, Counter[int]]


def judge_told(subject: Subject) -> Iterator[Finding]:
    """Every config field that the tensors contradict. Meant for a folder with all its files."""
    if subject.config is None:
        return
    for field, told in sorted(_told(subject).items()):
        said = getattr(subject.config, field)
        if told != said:
            key = _KEYS.get(field, field)
            yield error("config", f"{key} {_shown(said)}",
                        "The tensors' names and shapes say otherwise: the config is another"
                        " model's, or edited.",
                        file=subject.config_file, expected=f"{key} {_shown(told)}")  # fmt: skip


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _told(subject: Subject) -> dict[str, Any]:
    """Config field -> the value that most tensors imply."""
    votes = _votes(subject)
    size = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    told: dict[str, Any] = {
        field: size[letter] for letter, field in _FIELDS.items() if letter in size
    }
    if {"n", "h", "w", "g*o"} <= size.keys() and size["n"] * size["h"] % size["w"] == 0:
        told["o_groups"] = size["n"] * size["h"] // size["w"]
        told["o_lora_rank"] = size["g*o"] // max(told["o_groups"], 1)
    if {"x", "f"} <= size.keys():
        told["n_shared_experts"] = size["x"] // size["f"]
    return told | _counted(subject)


def _votes(subject: Subject) -> Votes:
    """By the catalogue's letters, how many axes say which size."""
    votes: Votes = defaultdict(Counter)
    for header in subject.folder.headers.values():
        for name, entry in header.entries.items():
            row = _ROWS.get(_PLACE.sub("", name, count=1))
            letters = [] if row is None else row.shape.split()
            if row is None or len(letters) != len(entry.shape):
                continue
            for axis, letter in enumerate(letters):
                packed = entry.dtype == "I8" and axis == 1  # two FP4 columns in a byte
                ranks = subject.folder.gpus if row.split == axis else 1
                votes[letter][entry.shape[axis] * ranks * (2 if packed else 1)] += 1
    return votes


def _counted(subject: Subject) -> dict[str, Any]:
    """The fields that say how many blocks there are, and of which kind."""
    assert subject.config is not None
    names, ratios = _blocks(subject)
    layers = [names[place] for place in sorted(names) if place[0] == "layers"]
    if not layers or ("layers", len(layers) - 1) not in names:
        return {}  # a whole layer is lost: that is the finding, not the config
    said = subject.config.compress_ratios
    told: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "num_mtp_blocks": len(names) - len(layers),
        "compress_ratios": tuple(
            ratios.get(layer, ratio if layer < len(layers) and layers[layer] & _OF_RATIO else 0)
            for layer, ratio in enumerate(said)
        ),
    }
    is_hash = [HASH_ROUTED[0].name in block for block in layers]
    if is_hash == [SCORED[0].name not in block for block in layers]:  # each layer has one of both
        told["num_hash_layers"] = max(sum(is_hash), _beyond(subject, sum(is_hash)))
    return told


def _beyond(subject: Subject, layers: int) -> int:
    """num_hash_layers may say more layers than there are; they are then all of that kind."""
    assert subject.config is not None
    config = subject.config
    return config.num_hash_layers if layers == config.num_hidden_layers else 0


def _blocks(subject: Subject) -> tuple[dict[tuple[str, int], set[str]], dict[int, int]]:
    """Names in each block (experts left out), and the compression ratio of each layer."""
    blocks: dict[tuple[str, int], set[str]] = defaultdict(set)
    ratios: dict[int, int] = {}
    for header in subject.folder.headers.values():
        for name, entry in header.entries.items():
            place = _PLACE.match(name)
            if place is None or place[3] is not None:
                continue
            short = name[place.end() :]
            blocks[place[1], int(place[2])].add(short)
            if short == COMPRESSED[0].name and place[1] == "layers" and entry.shape:
                ratios[int(place[2])] = entry.shape[0]
    return blocks, ratios
