"""Which tensors a pattern of reached positions points at. DETECTION.md: what real changes give."""

from __future__ import annotations

from dsv4_quant.checkpoint import Checkpoint
from dsv4_quant.fingerprints.suspects import Row, suspects

EVERY = range(8)


def rows(reached: set[int], experts: dict[int, tuple[int, ...]] | None = None) -> list[Row]:
    chosen = experts or {}
    return [Row(0, p, p in reached, chosen.get(p, ())) for p in range(40)]


ROUTES = {p: (p % 4, 4 + p % 3) for p in range(40)}


def test_the_one_expert_whose_positions_were_reached(ckpt: Checkpoint) -> None:
    found = suspects(ckpt, 3, "ffn", rows({p for p in range(40) if p % 3 == 2}, ROUTES), EVERY)
    assert found[:3] == [f"layers.3.ffn.experts.6.w{w}.weight" for w in (1, 2, 3)]
    assert set(found[3:]) == {"layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias"}


def test_an_expert_that_few_positions_missed(ckpt: Checkpoint) -> None:
    reached = {p for p in range(40) if p % 4 == 1} - {9}
    assert suspects(ckpt, 3, "ffn", rows(reached, ROUTES), EVERY)[0].startswith(
        "layers.3.ffn.experts.1."
    )


def test_what_every_position_uses(ckpt: Checkpoint) -> None:
    found = suspects(ckpt, 3, "ffn", rows(set(range(40)), ROUTES), EVERY)
    assert found[0] == "layers.3.ffn_norm.weight" and not any(".experts." in n for n in found)
    attention = suspects(ckpt, 0, "attn", rows(set(range(40))), ())
    assert {"layers.0.attn.wkv.weight", "layers.0.hc_attn_fn", "embed.weight"} <= set(attention)
    assert not any(".compressor." in name for name in attention)


def test_a_compressor_is_clear_of_what_came_before_its_first_window(ckpt: Checkpoint) -> None:
    late = suspects(ckpt, 1, "attn", rows(set(range(3, 40))), ())
    assert all(".compressor." in name for name in late if ".indexer." not in name)
    early = suspects(ckpt, 1, "attn", rows(set(range(40))), ())
    assert "layers.1.attn.wkv.weight" in early


def test_an_indexer_chooses_only_where_there_is_a_choice(ckpt: Checkpoint) -> None:
    first_choice = 4 * (ckpt.config.index_topk + 1) - 1
    found = suspects(ckpt, 1, "attn", rows({first_choice + 1}), ())
    assert all(".indexer." in name for name in found[:3])
    found = suspects(ckpt, 1, "attn", rows({first_choice - 1, first_choice + 1}), ())
    assert not any(".indexer." in name for name in found)


def test_no_row_was_reached(ckpt: Checkpoint) -> None:
    """A token that no row holds went elsewhere, or an expert that no row was routed to."""
    found = suspects(ckpt, 3, "ffn", rows(set(), ROUTES), EVERY)
    assert found[0] == "layers.3.ffn.experts.7.w1.weight" and len(found) == 5


def test_heads(ckpt: Checkpoint) -> None:
    own = suspects(ckpt, None, "head", [], ())
    assert own == ["head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"]
    of_mtp = suspects(ckpt, 5, "head", [], ())
    assert {"head.weight", "mtp.0.norm.weight"} <= set(of_mtp) and "norm.weight" not in of_mtp


def test_without_rows_everything_that_took_part(ckpt: Checkpoint) -> None:
    found = suspects(ckpt, 2, "ffn", [], [1, 6])
    assert {name.split(".")[4] for name in found if ".experts." in name} == {"1", "6"}
    assert "layers.2.ffn.shared_experts.w1.weight" in found
