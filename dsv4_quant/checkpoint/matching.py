"""Headers against the catalogue: which formats a checkpoint holds, and every name that is wrong.

The headers decide the formats. A config that contradicts them is an error that says both, except
for the contradictions that were published: scale_fmt "ue8m0" over F32 scales (-Base), no
expert_dtype (the first V4-Flash revision), one MTP layer announced and three held (0731, 0813).
"""

from __future__ import annotations

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
    catalogue = claimed.with_formats(formats)
    folder.problems += _contradictions(config, formats, folder, config_path)
    try:
        check_gpus(catalogue, folder.gpus)
    except UsageError as error:
        folder.problems.append(CatalogueError(error.what, file=folder.root, hint=error.hint))
    else:
        folder.problems += _differences(catalogue, folder)
    return catalogue


def _entry(folder: Folder, name: str) -> Entry | None:
    found = (header.entries.get(name) for header in folder.headers.values())
    return next((entry for entry in found if entry is not None), None)


def _found_formats(claimed: Catalogue, folder: Folder) -> Formats:
    """What the first expert, the first wq_a and the first wo_a are stored in."""
    specs = list(claimed.specs.values())
    block = claimed.config.fp8_block

    def found(spec: TensorSpec, otherwise: Format) -> Format:
        weight, scale = _entry(folder, spec.name), _entry(folder, spec.scale_name)
        if weight is None:
            return otherwise
        if weight.dtype in _FP4_DTYPES:
            return FP4
        if weight.dtype == "BF16":
            return BF16
        kind: ScaleKind = "f32" if scale is not None and scale.dtype == "F32" else "e8m0"
        return fp8(block, kind)

    expert = next(spec for spec in specs if spec.expert is not None)
    dense = next(spec for spec in specs if spec.name.endswith("attn.wq_a.weight"))
    wo_a = next(spec for spec in specs if spec.name.endswith("attn.wo_a.weight"))
    return Formats(
        experts=found(expert, claimed.formats.experts),
        dense=found(dense, claimed.formats.dense),
        wo_a=found(wo_a, claimed.formats.wo_a),
    )


def _contradictions(
    config: ModelConfig, formats: Formats, folder: Folder, path: Path
) -> Iterator[Dsv4Error]:
    def says(what: str, said: str, held: str) -> ConfigError:
        return ConfigError(
            f"The config says {what} {said}, the files hold {held}",
            file=path,
            hint="Is this the config of another revision?",
        )

    kind = formats.experts.kind
    if config.expert_dtype is not None and config.expert_dtype != kind:
        yield says("expert_dtype", config.expert_dtype, kind)
    if config.is_flat or folder.layout == "mp":
        return
    held = {formats.experts.kind, formats.dense.kind, formats.wo_a.kind}
    if config.weight_block_size is None and held != {"bf16"}:
        yield says("nothing of a", "quantization_config", " and ".join(sorted(held - {"bf16"})))
    if config.weight_block_size is not None and held == {"bf16"}:
        yield says("that weights are quantised, in its", "quantization_config", "only BF16")


def _differences(catalogue: Catalogue, folder: Folder) -> Iterator[Dsv4Error]:
    """Every tensor that is missing, unknown, or of another dtype or shape than it must be."""
    expected = expected_entries(catalogue, folder)
    for name, header in folder.headers.items():
        rest = dict(expected.get(name, {}))
        for tensor, entry in header.entries.items():
            want = rest.pop(tensor, None)
            path = folder.root / name
            if want is None:
                yield CatalogueError("A tensor that the config does not imply", file=path,
                                     tensor=tensor,
                                     hint="Is this the config of another model?")  # fmt: skip
            elif (entry.dtype, entry.shape) != want:
                yield CatalogueError(
                    f"Expected {want[0]} {list(want[1])}, found {entry.dtype} {list(entry.shape)}",
                    file=path,
                    tensor=tensor,
                )
        for tensor in rest:
            yield CatalogueError("The tensor is missing", file=folder.root / name, tensor=tensor,
                                 hint="The file is not complete, or another revision's.")  # fmt: skip


def expected_entries(
    catalogue: Catalogue, folder: Folder
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Per file: name -> (dtype, shape). An hf tensor belongs where it is, else where it misses."""
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {n: {} for n in folder.headers}
    where = {t: name for name, header in folder.headers.items() for t in header.entries}
    for tensor in catalogue.stored(folder.layout):
        for piece in placed(tensor, catalogue, folder):
            if folder.layout == "mp":
                name = f"model{piece.rank}-mp{folder.gpus}.safetensors"
            else:
                name = where.get(tensor.name) or folder.index.get(tensor.name, "")
                name = name if name in expected else next(iter(folder.headers), "")
            expected.setdefault(name, {})[tensor.name] = (tensor.dtype, piece.shape)
    return expected


def placed(tensor: StoredTensor, catalogue: Catalogue, folder: Folder) -> Iterator[Piece]:
    """The pieces of a tensor in the checkpoint's files."""
    return pieces(tensor, folder.gpus, catalogue.config.n_routed_experts)
