"""What the configs say of formats, and of the arithmetic, against the files and each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

from dsv4_quant.catalogue import Catalogue, published_formats
from dsv4_quant.checkpoint.folder import check_inside
from dsv4_quant.checkpoint.reader import CONFIGS
from dsv4_quant.config import FLAT_KEYS, FLAT_ROPE_KEYS, ModelConfig, read_config
from dsv4_quant.errors import UnreadableError
from dsv4_quant.validators.report import Finding, error, warning
from dsv4_quant.validators.subject import Subject

CONFIG, FLAT = CONFIGS

_FORMATS = frozenset(("weight_block_size", "expert_dtype", "is_flat", "raw"))
"""Fields of ModelConfig that speak of storage, or of the file itself."""


def judge_quantisation(subject: Subject) -> Iterator[Finding]:
    """Everything that the config says of formats, against what the headers show."""
    config, catalogue = subject.config, subject.catalogue
    if config is None or catalogue is None:
        return
    held, said = catalogue.formats, published_formats(config)
    file = subject.config_file

    def lie(key: str, says: Any, holds: str, meaning: str) -> Finding:
        return error("config", f"{key} {says}", meaning, file=file, expected=f"{key} {holds}")

    if config.expert_dtype not in (None, held.experts.kind):
        yield lie("expert_dtype", config.expert_dtype, held.experts.kind,
                  "A loader would read the experts as another format.")  # fmt: skip
    elif config.expert_dtype is None and held.experts.kind not in ("bf16", said.experts.kind):
        yield warning("config", "no expert_dtype",
                      f"Loaders guess then, and guess {said.experts.kind}.",
                      file=file, expected=f"expert_dtype {held.experts.kind}")  # fmt: skip
    kinds = {form.kind for form in (held.experts, held.dense, held.wo_a)}
    if not config.is_flat and (config.weight_block_size is None) != (kinds == {"bf16"}):
        present = "none" if config.weight_block_size is None else "present"
        holds = "none: all is BF16" if kinds == {"bf16"} else " and ".join(sorted(kinds))
        yield lie("quantization_config", present, holds, "A loader would not decode as it must.")
    blocks = {form.block for form in (held.dense, held.experts) if form.kind == "fp8"}
    for block in blocks - {config.fp8_block}:
        yield lie("weight_block_size", list(config.fp8_block), str(list(block or ())),
                  "Every scale would serve the wrong weights.")  # fmt: skip
    yield from _judge_scale_format(config, catalogue, file)
    scheme = (config.raw.get("quantization_config") or {}).get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        yield lie("activation_scheme", scheme, "dynamic", "The files hold no activation scales.")
    if subject.folder.layout == "hf":
        yield from _judge_skipped_modules(config, catalogue, file)


def _judge_scale_format(config: ModelConfig, catalogue: Catalogue, file: str) -> Iterator[Finding]:
    """The word float32 over E8M0 scales is a lie; ue8m0 over F32 ones was published (-Base)."""
    said = (config.raw.get("quantization_config") or config.raw).get("scale_fmt")
    formats = catalogue.formats
    scales = {form.scale for form in (formats.dense, formats.experts) if form.kind == "fp8"}
    if said == "float32" and "e8m0" in scales:
        yield error("config", "scale_fmt float32",
                    "A loader would read each scale's exponent byte as a number.",
                    file=file, expected="scale_fmt ue8m0")  # fmt: skip


def _judge_skipped_modules(
    config: ModelConfig, catalogue: Catalogue, file: str
) -> Iterator[Finding]:
    """modules_to_not_convert must name what the fp8 method covers but the files hold in BF16."""
    quantization = config.raw.get("quantization_config") or {}
    lists = [quantization.get(key) for key in ("modules_to_not_convert", "ignored_layers")]
    listed = {str(name) for names in lists if isinstance(names, list) for name in names}
    if listed and not listed & {"head", "lm_head"}:
        yield warning("config", "modules_to_not_convert lacks head",
                      "The list replaces the loaders' own, which spares the head.",
                      file=file, expected="head in it")  # fmt: skip
    if not quantization:
        return

    @cache
    def is_listed(module: str) -> bool:
        """It, or what it is a part of."""
        return module in listed or ("." in module and is_listed(module.rpartition(".")[0]))

    wrong: dict[str, str] = {}
    for spec in catalogue.specs.values():
        module = spec.name.removesuffix(".weight")
        if spec.kind == "fixed" or spec.format.is_quantised != is_listed(module):
            continue
        shown = module if spec.expert is None else module.rsplit(".", 2)[0]
        wrong[shown] = spec.format.kind
    for module, kind in wrong.items():
        if kind == "bf16":
            says, must = "lacks", f"{module} in it"
            meaning = "A loader would wait for scales that no file holds."
        else:
            says, must = "names", f"{module} not in it"
            meaning = f"A loader would take its {kind} codes for BF16 weights."
        yield error("config", f"modules_to_not_convert {says} {module}", meaning,
                    file=file, expected=must)  # fmt: skip


def judge_inference_config(subject: Subject) -> Iterator[Finding]:
    """inference/config.json must describe the model that config.json describes."""
    config, path = subject.config, subject.root / FLAT
    if config is not None and subject.config_file == FLAT and subject.folder.layout == "hf":
        yield error("config", "missing", f"{FLAT} was read instead; other loaders do not know it.",
                    file=CONFIG, expected="a config")  # fmt: skip
    if config is None or subject.config_file == FLAT or not path.is_file():
        return
    try:
        check_inside(subject.root, path)
        flat = read_config(path)
    except UnreadableError as wrong:
        yield error("config", wrong.what, "The published generate.py reads this file.", file=FLAT)
        return
    for key, mine, theirs in config_differences(config, flat):
        yield error("config", f"{key} {theirs}",
                    f"{CONFIG} says otherwise: one of both describes another model.",
                    file=FLAT, expected=f"{key} {mine}")  # fmt: skip
    if subject.catalogue is not None:
        held, said = subject.catalogue.formats.experts.kind, published_formats(flat).experts.kind
        if held != said:
            yield error("config", f"experts in {said}",
                        "The published generate.py would build the experts in another format.",
                        file=FLAT, expected=f"experts in {held}")  # fmt: skip


def config_differences(one: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, one's value, the other's) of everything that shapes the weights or the arithmetic.

    Storage is left out, and so is what one of them does not say: the flat dialect is shorter.
    """
    for field in fields(ModelConfig):
        key = field.name
        if key in _FORMATS or not (_says(one, key) and _says(other, key)):
            continue
        if key == "num_nextn_predict_layers":  # the DSpark releases say one, and hold three
            if one.num_mtp_blocks != other.num_mtp_blocks:
                yield "number of mtp blocks", one.num_mtp_blocks, other.num_mtp_blocks
        elif getattr(one, key) != getattr(other, key):
            yield key, getattr(one, key), getattr(other, key)


def _says(config: ModelConfig, key: str) -> bool:
    """Whether the file itself says a field, rather than a default."""
    if not config.is_flat:
        return True
    short = {name: flat for flat, name in (FLAT_KEYS | FLAT_ROPE_KEYS).items()}.get(key)
    return key in ("rope_scaling", "num_nextn_predict_layers") or short in config.raw
