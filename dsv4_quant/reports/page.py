"""A requantising run as one HTML page: no network, no date; the same input gives the same bytes."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from dsv4_quant import __version__
from dsv4_quant.formats.cost import total
from dsv4_quant.reports.bars import histogram
from dsv4_quant.reports.closeness import Closeness
from dsv4_quant.reports.field import make_field
from dsv4_quant.reports.grid import grid
from dsv4_quant.reports.heatmap import heatmap
from dsv4_quant.reports.hover import HOVER
from dsv4_quant.reports.markup import Markup, join, tag
from dsv4_quant.reports.recast import Recast, Rows, by_layer, casts, grouped
from dsv4_quant.reports.sections import facts, findings, numbers, prompts
from dsv4_quant.reports.style import STYLE
from dsv4_quant.reports.tables import layer_table, role_table, worst_table

WORST = 10

DEFINITIONS = {
    "SQNR": "signal to quantisation noise, 10 log10(sum v² / sum (v − w)²) in dB, of values v that"
    " became w; sums of squares are added up before the logarithm is taken.",
    "rms error": "the root of the summed squared error as a share of the root of the summed"
    " squares: 10 to the power of −SQNR/20.",
    "saturated": "values beyond the largest code times the block's scale; they became that largest"
    " value. Least-squares scales do this where it makes the block's error less.",
    "flushed": "values that were not zero and became zero: at most half of the smallest code times"
    " the block's scale.",
    "exact blocks": "blocks of which no value changed.",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What was converted to what; all of it is shown as it is given."""

    source: str
    """Name and revision, or folder."""
    output: str
    rule: str
    """How scales were chosen."""
    source_digest: str | None = None
    output_digest: str | None = None
    """Value digests, where they are known."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further facts by name, such as the calibration's."""
    tool: str = f"dsv4-quant {__version__}"


def page(
    rows: Sequence[Recast],
    run: Run,
    judged: Closeness | None = None,
    *,
    exponents: Counter[int] | None = None,
) -> str:
    """The whole page.

    Args:
        rows: every weight that is stored otherwise than before, in any order; at least one.
        run: for the heading.
        judged: a fingerprint comparison of the output, if there is one.
        exponents: the model's blocks by scale exponent, for rows that do not know their own (a
            manifest holds them per layer).
    """
    ordered = [row for held in by_layer(sorted(rows, key=_place)).values() for row in held]
    title = f"Requantised: {run.output}"
    body = tag(
        "main",
        tag("h1", "What requantising cost"),
        facts(_facts(ordered, run)),
        findings(ordered, judged),
        numbers(ordered),
        *_experts(ordered),
        _section(f"The worst {WORST} weights", worst_table(ordered, WORST)),
        _section("Error by role", role_table(ordered)),
        _section("Scale exponents", *_exponents(ordered, exponents)),
        *([_section("Fingerprint comparison", prompts(judged))] if judged else []),
        _section("By layer", layer_table(ordered)),
        *_others(ordered),
        _section("What the words mean", facts(DEFINITIONS)),
        tag("footer", f"{run.tool}. Numbers are rounded for reading; the tables' data elements hold"
            " them in full. Cells of the heat map: 0.01 dB, three digits of the largest error."),
    )  # fmt: skip
    head = tag(
        "head", tag("meta", charset="utf-8"), _policy(),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title), tag("style", Markup(STYLE)),
    )  # fmt: skip
    script = tag("script", Markup(HOVER))
    return f"<!doctype html>\n{tag('html', head, tag('body', body, script), lang='en')}\n"


def _place(row: Recast) -> tuple[int, str, str]:
    return -1 if row.spec.expert is None else row.spec.expert, row.within, row.name


def _facts(rows: Rows, run: Run) -> dict[str, str]:
    known = {
        "source": run.source,
        "source's value digest": run.source_digest,
        "output": run.output,
        "output's value digest": run.output_digest,
        "formats": "; ".join(f"{name} ({len(held):,})" for name, held in casts(rows).items()),
        "scales": run.rule,
        **run.more,
        "made by": run.tool,
    }
    return {name: value for name, value in known.items() if value is not None}


def _section(title: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), *content)


def _experts(rows: Rows) -> list[Markup]:
    held = [row for row in rows if row.spec.expert is not None]
    return [_section("SQNR by layer and expert", heatmap(make_field(held)))] if held else []


def _others(rows: Rows) -> list[Markup]:
    held = [row for row in rows if row.spec.expert is None]
    return [_section("SQNR of the weights that are no experts, dB", grid(held))] if held else []


def _exponents(rows: Rows, given: Counter[int] | None) -> list[Markup]:
    groups = grouped(rows, lambda row: str(row.after))
    found = {name: total(row.cost for row in held).exponents for name, held in groups.items()}
    if given and not any(found.values()):
        found = {"all formats": given}
    made = [histogram(exponents, name) for name, exponents in found.items() if exponents]
    note = "Blocks of zeros: s = −126 in FP4, −22 in FP8. A scale byte holds −127 to 127."
    return [*made, tag("p", note if made else "Not known.", class_="soft")]


def _policy() -> Markup:
    """Lets the page's own script run, and nothing else; nothing is fetched."""
    known = b64encode(sha256(HOVER.encode()).digest()).decode()
    rule = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    )
    return join(tag("meta", http_equiv="Content-Security-Policy", content=rule))
