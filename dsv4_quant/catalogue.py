"""From a config, every tensor that a checkpoint must hold. The only file that spells tensor names.

The table below gives, per weight: its name inside a block, its shape in letters, how it is stored
and how the published inference code splits it over GPUs. Quantised weights bring their ``.scale``.
Derived from the published checkpoints; it reproduces their tensor counts and bytes exactly.

    d hidden_size            v vocab_size              s hc_mult (streams)
    f moe_intermediate_size  e n_routed_experts        k num_experts_per_tok
    n num_attention_heads    h head_dim                q q_lora_rank
    g o_groups               o o_lora_rank             w heads of a group x head_dim
    i index_n_heads          j index_head_dim          m (2 + s) * s (mixes)
    r compress_ratio         c series (2 for ratio 4, else 1)
    x n_shared_experts * f   t DSpark target layers    y dspark_markov_rank   z d + y
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod
from typing import Literal, NamedTuple

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UsageError
from dsv4_quant.formats.blocks import BF16, F32, FP4, I64, Format, fp8

Split = Literal[0, 1, "expert"] | None
"""Over GPUs: along that axis, whole experts by index range, or (None) a copy on every GPU."""

Layout = Literal["hf", "mp"]

Kind = Literal["dense", "expert", "wo_a", "fixed"]
"""Which of the Formats a weight follows; fixed ones are stored the same everywhere."""

CSA_RATIO = 4
"""The ratio whose compressor overlaps two series and whose layers have an indexer."""


@dataclass(frozen=True, slots=True)
class Formats:
    """What a checkpoint may store in more than one way."""

    experts: Format
    dense: Format
    wo_a: Format
    """The published converter decodes wo_a to BF16; the published checkpoints hold it in FP8."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``kind``: dense, expert or wo_a (see Formats), else fixed."""

    name: str
    shape: str
    kind: Literal["dense", "expert", "wo_a"] | Format
    split: Split
    role: str


TOP_FIRST = (Row("embed.weight", "v d", BF16, 0, "embed"),)
TOP_LAST = (
    Row("head.weight", "v d", BF16, 0, "head"),
    Row("norm.weight", "d", BF16, None, "norm"),
    Row("hc_head_fn", "s s*d", F32, None, "hyper-connections"),
    Row("hc_head_base", "s", F32, None, "hyper-connections"),
    Row("hc_head_scale", "1", F32, None, "hyper-connections"),
)
BLOCK = (
    Row("attn.attn_sink", "n", F32, 0, "attention"),
    Row("attn.wq_a.weight", "q d", "dense", None, "attention"),
    Row("attn.q_norm.weight", "q", BF16, None, "norm"),
    Row("attn.wq_b.weight", "n*h q", "dense", 0, "attention"),
    Row("attn.wkv.weight", "h d", "dense", None, "attention"),
    Row("attn.kv_norm.weight", "h", BF16, None, "norm"),
    Row("attn.wo_a.weight", "g*o w", "wo_a", 0, "attention"),
    Row("attn.wo_b.weight", "d g*o", "dense", 1, "attention"),
    Row("attn_norm.weight", "d", BF16, None, "norm"),
    Row("ffn_norm.weight", "d", BF16, None, "norm"),
    Row("ffn.gate.weight", "e d", BF16, None, "gate"),
    Row("ffn.shared_experts.w1.weight", "x d", "dense", None, "shared experts"),
    Row("ffn.shared_experts.w2.weight", "d x", "dense", None, "shared experts"),
    Row("ffn.shared_experts.w3.weight", "x d", "dense", None, "shared experts"),
    Row("hc_attn_fn", "m s*d", F32, None, "hyper-connections"),
    Row("hc_attn_base", "m", F32, None, "hyper-connections"),
    Row("hc_attn_scale", "3", F32, None, "hyper-connections"),
    Row("hc_ffn_fn", "m s*d", F32, None, "hyper-connections"),
    Row("hc_ffn_base", "m", F32, None, "hyper-connections"),
    Row("hc_ffn_scale", "3", F32, None, "hyper-connections"),
)
EXPERT = (
    Row("w1.weight", "f d", "expert", "expert", "experts"),
    Row("w2.weight", "d f", "expert", "expert", "experts"),
    Row("w3.weight", "f d", "expert", "expert", "experts"),
)
HASH_ROUTED = (Row("ffn.gate.tid2eid", "v k", I64, None, "gate"),)
SCORED = (Row("ffn.gate.bias", "e", F32, None, "gate"),)
COMPRESSED = (
    Row("attn.compressor.ape", "r c*h", F32, None, "compressor"),
    Row("attn.compressor.wkv.weight", "c*h d", BF16, None, "compressor"),
    Row("attn.compressor.wgate.weight", "c*h d", BF16, None, "compressor"),
    Row("attn.compressor.norm.weight", "h", BF16, None, "norm"),
)
INDEXED = (
    Row("attn.indexer.wq_b.weight", "i*j q", "dense", 0, "indexer"),
    Row("attn.indexer.weights_proj.weight", "i d", BF16, 0, "indexer"),
    Row("attn.indexer.compressor.ape", "r c*j", F32, None, "indexer"),
    Row("attn.indexer.compressor.wkv.weight", "c*j d", BF16, None, "indexer"),
    Row("attn.indexer.compressor.wgate.weight", "c*j d", BF16, None, "indexer"),
    Row("attn.indexer.compressor.norm.weight", "j", BF16, None, "norm"),
)
MTP_APRIL = (
    Row("e_proj.weight", "d d", "dense", None, "mtp"),
    Row("h_proj.weight", "d d", "dense", None, "mtp"),
    Row("enorm.weight", "d", BF16, None, "norm"),
    Row("hnorm.weight", "d", BF16, None, "norm"),
)
MTP_HEAD = TOP_LAST[1:]
DSPARK_FIRST = (
    Row("main_proj.weight", "d t*d", "dense", None, "mtp"),
    Row("main_norm.weight", "d", BF16, None, "norm"),
)
DSPARK_LAST = (
    *MTP_HEAD,
    Row("markov_head.markov_w1.weight", "v y", BF16, 0, "mtp"),
    Row("markov_head.markov_w2.weight", "v y", BF16, 0, "mtp"),
    Row("confidence_head.proj.weight", "1 z", BF16, None, "mtp"),
)


class TensorSpec(NamedTuple):
    """One logical weight. ``layer`` counts on through the mtp blocks; None for the top level."""

    name: str
    shape: tuple[int, ...]
    format: Format
    split: Split
    role: str
    kind: Kind = "fixed"
    layer: int | None = None
    expert: int | None = None

    @property
    def scale_name(self) -> str:
        """The name on disk of a quantised weight's scales."""
        return self.name.removesuffix(".weight") + ".scale"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row."""
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])


class StoredTensor(NamedTuple):
    """What a file holds: a weight's codes or its scales. ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: TensorSpec
    is_scale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


DTYPE_BITS = {"F4": 4, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F32": 32, "I64": 64}
_DTYPE = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32", "i64": "I64"}


def stored(spec: TensorSpec, layout: Layout) -> tuple[StoredTensor, ...]:
    """The tensors on disk of one weight: codes, and scales where it is quantised.

    FP4 codes are ``I8 [R, C/2]`` in an hf checkpoint and ``F4 [R, C]`` (same bytes) in an mp one.
    """
    shape, form = spec.shape, spec.format
    if form.kind == "fp4":
        packed = "F4" if layout == "mp" else "I8"
        held = shape if layout == "mp" else (shape[0], shape[1] // 2)
        weight = StoredTensor(spec.name, packed, held, spec)
    else:
        weight = StoredTensor(spec.name, _DTYPE[form.kind], shape, spec)
    if not form.is_quantised:
        return (weight,)
    dtype = "F8_E8M0" if form.scale == "e8m0" else "F32"
    return weight, StoredTensor(spec.scale_name, dtype, form.scale_shape(shape), spec, True)


@dataclass(frozen=True)
class Catalogue:
    """Every weight of one model in one choice of formats."""

    config: ModelConfig
    formats: Formats

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Weights by name, in the model's order."""
        return {spec.name: spec for spec in self._all()}

    def stored(self, layout: Layout) -> Iterator[StoredTensor]:
        """Every tensor on disk, whole (not split), in the model's order."""
        for spec in self.specs.values():
            yield from stored(spec, layout)

    def with_formats(self, formats: Formats) -> Catalogue:
        """The same weights stored otherwise."""
        return self if formats == self.formats else replace(self, formats=formats)

    def _all(self) -> Iterator[TensorSpec]:
        config = self.config
        yield from self._rows(TOP_FIRST, "", None)
        for layer in range(config.num_hidden_layers):
            yield from self._block(f"layers.{layer}.", layer)
        yield from self._rows(TOP_LAST, "", None)
        for block in range(config.num_mtp_blocks):
            layer = config.num_hidden_layers + block
            yield from self._block(f"mtp.{block}.", layer)
            yield from self._rows(self._mtp_rows(block), f"mtp.{block}.", layer)

    def _block(self, prefix: str, layer: int) -> Iterator[TensorSpec]:
        config = self.config
        ratio = config.compress_ratios[layer]
        is_hash = layer < min(config.num_hash_layers, config.num_hidden_layers)
        rows: tuple[Row, ...] = BLOCK + (HASH_ROUTED if is_hash else SCORED)
        rows += COMPRESSED if ratio else ()
        rows += INDEXED if ratio == CSA_RATIO else ()
        yield from self._rows(rows, prefix, layer)
        yield from self._rows(
            EXPERT, f"{prefix}ffn.experts.", layer, range(config.n_routed_experts)
        )

    def _mtp_rows(self, block: int) -> tuple[Row, ...]:
        if not self.config.is_dspark:
            return MTP_APRIL + MTP_HEAD
        first = DSPARK_FIRST if block == 0 else ()
        return first + (DSPARK_LAST if block == self.config.num_mtp_blocks - 1 else ())

    def _rows(
        self, rows: tuple[Row, ...], prefix: str, layer: int | None, experts: range | None = None
    ) -> Iterator[TensorSpec]:
        """The weights of some rows; with ``experts`` those of each, its number in the name.

        What a row means is worked out once for all experts: V4-Pro has 71,424 of these weights.
        """
        ratio = 0 if layer is None else self.config.compress_ratios[layer]
        in_mtp = prefix.startswith("mtp.")
        meant: list[tuple[str, tuple[int, ...], Format, Split, str, Kind]] = [
            (row.name, self._shape(row.shape, ratio), self._format(row), row.split,
             "mtp" if in_mtp else row.role, "fixed" if isinstance(row.kind, Format) else row.kind)
            for row in rows
        ]  # fmt: skip
        for expert in (None,) if experts is None else experts:
            start = prefix if expert is None else f"{prefix}{expert}."
            for name, shape, form, split, role, kind in meant:
                yield TensorSpec(start + name, shape, form, split, role, kind, layer, expert)

    def _format(self, row: Row) -> Format:
        if isinstance(row.kind, Format):
            return row.kind
        chosen = {
            "dense": self.formats.dense,
            "expert": self.formats.experts,
            "wo_a": self.formats.wo_a,
        }
        return chosen[row.kind]

    def _shape(self, letters: str, ratio: int) -> tuple[int, ...]:
        key = (letters, ratio)
        if key not in self._shapes:
            self._shapes[key] = tuple(
                prod(self._size(letter, ratio) for letter in axis.split("*"))
                for axis in letters.split()
            )
        return self._shapes[key]

    @cached_property
    def _shapes(self) -> dict[tuple[str, int], tuple[int, ...]]:
        return {}

    def _size(self, letter: str, ratio: int) -> int:
        if letter.isdigit():
            return int(letter)
        if letter == "r":
            return ratio
        if letter == "c":
            return 2 if ratio == CSA_RATIO else 1
        return _SIZES[letter](self.config)


_SIZES: Mapping[str, Callable[[ModelConfig], int]] = {
    "v": lambda c: c.vocab_size,
    "d": lambda c: c.hidden_size,
    "f": lambda c: c.moe_intermediate_size,
    "x": lambda c: c.n_shared_experts * c.moe_intermediate_size,
    "e": lambda c: c.n_routed_experts,
    "k": lambda c: c.num_experts_per_tok,
    "n": lambda c: c.num_attention_heads,
    "h": lambda c: c.head_dim,
    "q": lambda c: c.q_lora_rank,
    "g": lambda c: c.o_groups,
    "o": lambda c: c.o_lora_rank,
    "w": lambda c: c.num_attention_heads * c.head_dim // c.o_groups,
    "i": lambda c: c.index_n_heads,
    "j": lambda c: c.index_head_dim,
    "s": lambda c: c.hc_mult,
    "m": lambda c: (2 + c.hc_mult) * c.hc_mult,
    "t": lambda c: len(c.dspark_target_layer_ids),
    "y": lambda c: c.dspark_markov_rank,
    "z": lambda c: c.hidden_size + c.dspark_markov_rank,
}


def published_formats(config: ModelConfig) -> Formats:
    """The formats that the config claims; what the headers say goes before it.

    Without expert_dtype, the first V4-Flash revision means FP4, the flat dialect FP8.
    """
    dense = BF16 if config.weight_block_size is None else fp8(config.fp8_block)
    unsaid = dense if config.is_flat or dense == BF16 else FP4
    experts = {"fp4": FP4, "fp8": fp8(config.fp8_block), "bf16": BF16, None: unsaid}
    return Formats(experts=experts[config.expert_dtype], dense=dense, wo_a=dense)


def shard_of(spec: TensorSpec, config: ModelConfig) -> int:
    """The published rule: embed first, one shard per layer, the head, one per mtp block.

    Counted from 0; ``shard_count`` says how many there are.
    """
    layers = config.num_hidden_layers
    if spec.layer is None:
        return 0 if spec.role == "embed" else layers + 1
    return spec.layer + 1 if spec.layer < layers else spec.layer + 2


def shard_count(config: ModelConfig) -> int:
    """Shards of a published checkpoint."""
    return config.num_hidden_layers + 2 + config.num_mtp_blocks


def possible_gpus(catalogue: Catalogue) -> list[int]:
    """Every GPU count that all tensors can be split by, ascending."""
    common = 0
    for _, count in _split_units(catalogue):
        common = gcd(common, count)
    return [n for n in range(1, common + 1) if common % n == 0]


def check_gpus(catalogue: Catalogue, gpus: int) -> None:
    """Raises UsageError that names what cannot be split, and the counts that work."""
    if gpus < 1:
        raise UsageError(
            f"A checkpoint cannot be split over {gpus} GPUs", hint=_possible(catalogue)
        )
    bad = [f"{what} ({count})" for what, count in _split_units(catalogue) if count % gpus]
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise UsageError(
            f"This model cannot be split over {gpus} GPUs: {gpus} does not divide"
            f" {', '.join(bad[:4])}{more}",
            hint=_possible(catalogue),
        )


def _possible(catalogue: Catalogue) -> str:
    return f"Possible GPU counts: {', '.join(map(str, possible_gpus(catalogue)))}."


def _split_units(catalogue: Catalogue) -> Iterator[tuple[str, int]]:
    """What must be divisible by the GPU count: name of the thing, and how many there are.

    The sizes that the published inference code divides, and for a quantised weight its scale
    blocks along the split axis, because a scale cannot serve two GPUs.
    """
    config = catalogue.config
    yield "n_routed_experts", config.n_routed_experts
    yield "num_attention_heads", config.num_attention_heads
    yield "o_groups", config.o_groups
    yield "vocab_size", config.vocab_size
    if CSA_RATIO in config.compress_ratios:
        yield "index_n_heads", config.index_n_heads
    seen = set()
    for spec in catalogue.specs.values():
        if spec.split not in (0, 1):
            continue
        short = spec.name.split(".", 2)[-1] if spec.layer is not None else spec.name
        if short in seen:
            continue
        seen.add(short)
        axis = int(spec.split)
        size = spec.shape[axis]
        if spec.format.is_quantised:
            assert spec.format.block is not None
            block = spec.format.block[axis]
            size = size // block if size % block == 0 else 1  # a ragged last block cannot move
            yield f"blocks of {block} along axis {axis} of {short}", size
        else:
            yield f"axis {axis} of {short}", size
