"""Headers against the catalogue: which formats a checkpoint holds, and every name that is wrong.

The headers decide the formats. A config that contradicts them is an error that says both, except
for the contradictions that were published: scale_fmt "ue8m0" over F32 scales (-Base), no
expert_dtype (the first V4-Flash revision), one MTP layer announced and three held (0731, 0813).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dsv4_quant.catalogue import (
    Catalogue,
    Formats,
    StoredTensor,
    TensorSpec,
    check_gpus,
    published_formats,
)
from dsv4_quant.checkpoint.folder import Folder
from dsv4_quant.checkpoint.header import Entry
from dsv4_quant.checkpoint.placement import Piece, pieces
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CatalogueError, ConfigError, Dsv4Error, UsageError
from dsv4_quant.formats.blocks import BF16, FP4, Format, ScaleKind, fp8

_FP4_DTYPES = ("I8", "F4")


def match(folder: Folder, config: ModelConfig, config_path: Path) -> Catalogue:
    """The catalogue in the formats that the headers show; problems are added to the folder's."""
    claimed = Catalogue(config, published_formats(config))
    formats = _found_formats(claimed, folder)
    catalogue = claimed if formats == claimed.formats else claimed.with_formats(formats)
    folder.report(_contradictions(config, formats, folder, config_path))
    try:
        check_gpus(catalogue, folder.gpus)
    except UsageError as error:
        folder.report([CatalogueError(error.what, file=folder.root, hint=error.hint)])
    else:
        folder.report(_differences(catalogue, folder))
    return catalogue


def _entry(folder: Folder, name: str) -> Entry | None:
    found = (header.entries.get(name) for header in folder.headers.values())
    return next((entry for entry in found if entry is not None), None)


def _found_formats(claimed: Catalogue, folder: Folder) -> Formats:
    """What most blocks store their first expert, wq_a and wo_a in: one damaged one has no say."""

    def found(suffix: str, otherwise: Format) -> Format:
        specs = [spec for name, spec in claimed.specs.items() if name.endswith(suffix)]
        seen = Counter(filter(None, (_stored_format(spec, claimed, folder) for spec in specs)))
        return seen.most_common(1)[0][0] if seen else otherwise

    return Formats(
        experts=found("ffn.experts.0.w1.weight", claimed.formats.experts),
        dense=found("attn.wq_a.weight", claimed.formats.dense),
        wo_a=found("attn.wo_a.weight", claimed.formats.wo_a),
    )


def _stored_format(spec: TensorSpec, claimed: Catalogue, folder: Folder) -> Format | None:
    """The format that a weight's headers show; None where it is missing or no format at all."""
    weight, scale = _entry(folder, spec.name), _entry(folder, spec.scale_name)
    if weight is None:
        return None
    if weight.dtype in _FP4_DTYPES and spec.expert is not None:
        return FP4
    if weight.dtype == "BF16":
        return BF16
    if weight.dtype != "F8_E4M3" or scale is None or len(weight.shape) != len(scale.shape):
        return None
    block = tuple(map(_block_size, weight.shape, scale.shape, claimed.config.fp8_block))
    kind: ScaleKind = "f32" if scale.dtype == "F32" else "e8m0"
    return fp8((block[0], block[1]), kind) if len(block) == 2 else None


def _block_size(size: int, blocks: int, said: int) -> int:
    """The block along one axis that makes ``blocks`` of ``size``: as the config says, if it can."""
    powers = [1 << power for power in range(16) if 1 << power <= size]
    return next((b for b in (said, *powers) if -(-size // b) == blocks), said)


def _contradictions(
    config: ModelConfig, formats: Formats, folder: Folder, path: Path
) -> Iterator[Dsv4Error]:
    def says(what: str, said: str, held: str) -> ConfigError:
        return ConfigError(
            f"The config says {what} {said}, the files hold {held}",
            file=path,
            hint="Is this the config of another revision?",
        )

    experts, dense = formats.experts.kind, formats.dense.kind
    kinds = {experts, dense, formats.wo_a.kind}
    said = published_formats(config)
    if config.expert_dtype not in (None, experts):
        yield says("expert_dtype", str(config.expert_dtype), experts)
    blocks = {form.block for form in (formats.dense, formats.experts) if form.kind == "fp8"}
    if config.is_flat:
        if dense != said.dense.kind:
            yield says("dtype", said.dense.kind, dense)
        if config.expert_dtype is None and experts != said.experts.kind:
            yield says("nothing of an", "expert_dtype", experts)
    elif config.weight_block_size is None and kinds != {"bf16"}:
        yield says("nothing of a", "quantization_config", " and ".join(sorted(kinds - {"bf16"})))
    elif config.weight_block_size is not None and kinds == {"bf16"}:
        yield says("that weights are quantised, in its", "quantization_config", "only BF16")
    if blocks - {config.fp8_block}:
        size = " and ".join("x".join(map(str, block)) for block in blocks if block)
        yield says("weight_block_size", "x".join(map(str, config.fp8_block)), size)


def _differences(catalogue: Catalogue, folder: Folder) -> Iterator[Dsv4Error]:
    """Every tensor that is missing, unknown, or of another dtype or shape than it must be."""
    expected = expected_entries(catalogue, folder)
    for name, header in folder.headers.items():
        rest, path = expected.pop(name, {}), folder.root / name
        for tensor, entry in header.entries.items():
            want = rest.pop(tensor, None)
            if want is None:
                yield CatalogueError(
                    "A tensor that the config does not imply",
                    file=path,
                    tensor=tensor,
                    hint="Is this the config of another model?",
                )
            elif (entry.dtype, entry.shape) != want:
                yield CatalogueError(
                    f"Expected {want[0]} {list(want[1])}, found {entry.dtype} {list(entry.shape)}",
                    file=path,
                    tensor=tensor,
                )
        for tensor in rest:
            yield CatalogueError(
                "The tensor is missing",
                file=path,
                tensor=tensor,
                hint="The file is not complete, or another revision's.",
            )


def expected_entries(
    catalogue: Catalogue, folder: Folder
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Per file: name -> (dtype, shape). An hf tensor belongs where it is, else where the index
    says, else in the first shard. Files that could not be read are among them.
    """
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {n: {} for n in folder.headers}
    first = next(iter(expected), "")
    where = {t: name for name, header in folder.headers.items() for t in header.entries}
    for tensor in catalogue.stored(folder.layout):
        if folder.layout == "hf":
            file = where.get(tensor.name) or folder.index.get(tensor.name, first)
            expected.setdefault(file, {})[tensor.name] = (tensor.dtype, tensor.shape)
            continue
        for piece in placed(tensor, catalogue, folder):
            file = f"model{piece.rank}-mp{folder.gpus}.safetensors"
            expected.setdefault(file, {})[tensor.name] = (tensor.dtype, piece.shape)
    return expected


def placed(tensor: StoredTensor, catalogue: Catalogue, folder: Folder) -> tuple[Piece, ...]:
    """The pieces of a tensor in the checkpoint's files."""
    return pieces(tensor, folder.gpus, catalogue.config.n_routed_experts)
