"""The published DeepSeek-V4 ``convert.py`` (April 2026), rewritten plainly in PyTorch as an oracle.

It keeps what makes the published script recognisable, so that its output can be expected byte for
byte and its cost measured: every rank's state dict is held in memory at once, shards are read with
a glob and without the index, tensors are told apart by substrings of their names, a name that no
rule knows is replicated on every rank, and nothing is checked for loss. The tool under test shares
no code with it.

As a script: ``python tests/oracle/published_converter.py SRC OUT --ranks 8 --expert-dtype fp8``.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# E2M1 by code. Code 8 is +0.0: the published table has no negative zero.
FP4_VALUES = torch.tensor(
    [
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        [0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    ]
).flatten()
TILE = 128
FP4_BLOCK = 32
HEADROOM = 2.0**6  # 6 * 2**6 = 384, the largest FP4 value times this still fits E4M3's 448

# Module name -> axis along which its weight and scale are split over the ranks.
SPLIT_AXIS = {
    "embed": 0,
    "wq_b": 0,
    "wo_a": 0,
    "wo_b": 1,
    "head": 0,
    "attn_sink": 0,
    "weights_proj": 0,
    "markov_w1": 0,
    "markov_w2": 0,
}
# Names that hold one of these end in the parameter itself, not in ".weight" or ".scale".
# "tie2eid" is the published spelling: it never matches, and "gate.tid2eid" is replicated as "gate".
BARE_NAME_MARKS = ("hc", "attn_sink", "tie2eid", "ape")


def local_name(name: str) -> str | None:
    """The name in the inference code, or None for a tensor that the published script drops."""
    name = name.removeprefix("model.")
    if "mtp" in name and ("emb" in name or name.endswith("head.weight")):
        return None
    for old, new in (
        ("self_attn", "attn"),
        ("mlp", "ffn"),
        ("weight_scale_inv", "scale"),
        ("e_score_correction_bias", "bias"),
    ):
        name = name.replace(old, new)
    return name


def is_expert(name: str) -> bool:
    return "experts" in name and "shared_experts" not in name


def split_axis(name: str) -> int | None:
    parts = name.split(".")
    bare = any(mark in name for mark in BARE_NAME_MARKS)
    return SPLIT_AXIS.get(parts[-1] if bare else parts[-2])


def rank_part(
    name: str, tensor: torch.Tensor, rank: int, n_ranks: int, n_experts: int
) -> torch.Tensor | None:
    """What `rank` stores of a tensor: its experts, its slice, or a replica; None for nothing."""
    if is_expert(name):
        per_rank = n_experts // n_ranks
        return tensor if int(name.split(".")[-3]) // per_rank == rank else None
    axis = split_axis(name)
    if axis is None:
        return tensor
    if tensor.size(axis) % n_ranks:
        raise ValueError(f"{name}: axis {axis} of {list(tensor.shape)} over {n_ranks} ranks")
    size = tensor.size(axis) // n_ranks
    return tensor.narrow(axis, rank * size, size).contiguous()


def fp4_to_fp8(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast FP4 with a scale per 1x32 to E4M3 with a scale per 128x128, as published.

    packed: int8 [N, K/2], low nibble first; scale: float8_e8m0fnu [N, K/32].
    Returns float8_e4m3fn [N, K] and float8_e8m0fnu [N/128, K/128].
    """
    rows, cols = packed.size(0), 2 * packed.size(1)
    if rows % TILE or cols % TILE:
        raise ValueError(f"{rows}x{cols} is not made of {TILE}x{TILE} tiles")
    codes = packed.view(torch.uint8)
    values = torch.stack([FP4_VALUES[(codes & 15).long()], FP4_VALUES[(codes >> 4).long()]], dim=-1)
    # [N/128, 128, K/128, 4, 32]: tile row, row, tile column, block, element
    values = values.view(rows // TILE, TILE, cols // TILE, TILE // FP4_BLOCK, FP4_BLOCK)
    blocks = scale.float().view(rows // TILE, TILE, cols // TILE, TILE // FP4_BLOCK)
    tile = blocks.amax(dim=(1, 3)) / HEADROOM
    offset = blocks / tile[:, None, :, None]
    cast = (values * offset[..., None]).view(rows, cols).to(torch.float8_e4m3fn)
    return cast, tile.to(torch.float8_e8m0fnu)


def fp8_to_bf16(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode E4M3 [N, K] with a scale per 128x128, [N/128, K/128], to BF16."""
    tiles = weight.float().unflatten(0, (-1, TILE)).unflatten(-1, (-1, TILE))
    return (tiles * scale.float()[:, None, :, None]).flatten(2, 3).flatten(0, 1).bfloat16()


def finish_rank(state: dict[str, torch.Tensor], expert_dtype: str | None) -> None:
    """Give `wo_a` and the FP4 experts of one rank the form that the inference code loads."""
    for name in list(state):
        if not name.endswith(".weight"):
            continue
        scale = name.removesuffix(".weight") + ".scale"
        if name.endswith("wo_a.weight"):
            state[name] = fp8_to_bf16(state[name], state.pop(scale))
        elif is_expert(name) and state[name].dtype == torch.int8:
            if expert_dtype == "fp8":
                state[name], state[scale] = fp4_to_fp8(state[name], state[scale])
            else:
                state[name] = state[name].view(torch.float4_e2m1fn_x2)


def convert(
    hf_path: str | Path,
    out_path: str | Path,
    n_ranks: int,
    expert_dtype: str | None = None,
    n_experts: int | None = None,
) -> None:
    """Write `model{rank}-mp{n_ranks}.safetensors` for every rank, as the published script does.

    expert_dtype: "fp8" casts FP4 experts; "fp4" and None keep them. Experts that are not FP4 on
    disk pass through either way. n_experts defaults to `n_routed_experts` of config.json.
    """
    source, out = Path(hf_path), Path(out_path)
    if n_experts is None:
        n_experts = int(json.loads((source / "config.json").read_text())["n_routed_experts"])
    if n_experts % n_ranks:
        raise ValueError(f"{n_experts} experts over {n_ranks} ranks")
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(n_ranks)]
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as shard:
            stored_names = shard.keys()
            for stored_name in stored_names:
                name = local_name(stored_name)
                if name is None:
                    continue
                tensor = shard.get_tensor(stored_name)
                for rank, state in enumerate(states):
                    part = rank_part(name, tensor, rank, n_ranks, n_experts)
                    if part is not None:
                        state[name] = part
    out.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate(states):
        finish_rank(state, expert_dtype)
        save_file(state, out / f"model{rank}-mp{n_ranks}.safetensors")
    for extra in ("tokenizer.json", "tokenizer_config.json"):
        if (source / extra).exists():
            shutil.copyfile(source / extra, out / extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=convert.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--expert-dtype", choices=["fp8", "fp4"])
    parser.add_argument("--n-experts", type=int)
    args = parser.parse_args()
    convert(args.source, args.out, args.ranks, args.expert_dtype, args.n_experts)


if __name__ == "__main__":
    main()
