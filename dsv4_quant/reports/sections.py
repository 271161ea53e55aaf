"""What the page says before any picture: what was done, how good it is, the model's figures."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4_quant.formats.cost import Cost
from dsv4_quant.reports.bars import bar
from dsv4_quant.reports.closeness import Closeness
from dsv4_quant.reports.figures import decibels, magnitude, part, percent, relative_error, size
from dsv4_quant.reports.markup import Markup, figure, join, tag
from dsv4_quant.reports.recast import APART, NORMAL, Rows, apart, casts, model, sizes
from dsv4_quant.reports.tables import table

FEW = 3
"""Weights apart that the findings name; the table of the worst has more."""


def facts(given: Mapping[str, str]) -> Markup:
    """A list of names and what they stand for."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in given.items()]
    return tag("dl", *pairs, class_="facts")


def findings(rows: Rows, judged: Closeness | None) -> Markup:
    """Good or not, in a few sentences."""
    said = [_of_cast(name, held) for name, held in casts(rows).items()]
    said.append(_apart(rows))
    said.append(_judged(judged))
    return tag("ul", *(tag("li", text, class_=kind) for kind, text in said), class_="findings")


def _of_cast(name: str, rows: Rows) -> tuple[str, Markup]:
    cost, kind = model(rows), rows[0].after.kind
    weights = f"{len(rows):,} weight{'' if len(rows) == 1 else 's'} {name}: "
    if cost.error_squares == 0:
        return "good", join(weights, tag("strong", "exact"), ", no value changed.")
    usual = f" Normally distributed values would give {NORMAL[kind]:.1f}." if kind in NORMAL else ""
    strong = tag("strong", figure(cost.sqnr, f"{decibels(cost.sqnr)} dB"))
    level = "good" if cost.sqnr >= NORMAL.get(kind, 0.0) - APART else "bad"
    return level, join(weights, strong, f".{usual}")


def _apart(rows: Rows) -> tuple[str, Markup]:
    found = apart(rows)
    if not found:
        return "good", join(
            tag("strong", "No weight stands apart"),
            f": none is more than {APART:g} dB below the median of its kind.",
        )
    named = [
        join(tag("code", one.row.name), " (", decibels(one.row.cost.sqnr), " dB; its kind ",
             decibels(one.typical), " dB)")
        for one in found[:FEW]
    ]  # fmt: skip
    listed = [join(", " if i else "", name) for i, name in enumerate(named)]
    more = f" and {len(found) - FEW:,} more" if len(found) > FEW else ""
    count = f"{len(found):,} of {len(rows):,} weights {'stand' if len(found) > 1 else 'stands'}"
    return "bad", join(
        tag("strong", f"{count} apart"),
        f", more than {APART:g} dB below the median of {'their' if len(found) > 1 else 'its'} kind:"
        " ",
        *listed,
        f"{more}.",
    )


def _judged(judged: Closeness | None) -> tuple[str, Markup]:
    if judged is None:
        return "open", join(
            tag("strong", "What the model says was not compared."), " ",
            tag("code", "dsv4-quant verify OUT --fingerprint F.json"),
            " does that: errors of weights alone do not tell what the model lost.",
        )  # fmt: skip
    if judged.holds:
        return "good", join(tag("strong", f"The {judged.gate} gate holds"), ": ", measured(judged))
    return "bad", join(
        tag("strong", f"The {judged.gate} gate does not hold"), f": {'; '.join(judged.broken)}."
    )


def measured(judged: Closeness) -> Markup:
    """KL and top-1 with their limits, as far as they are known."""
    parts = []
    if judged.kl is not None:
        limit = f" nats (lossy allows {judged.kl_limit:g})"
        parts.append(join("mean KL divergence ", figure(judged.kl, magnitude(judged.kl)), limit))
    if judged.top1 is not None:
        parts.append(
            join(
                "likeliest token the same at ", figure(judged.top1, percent(judged.top1)),
                f" of {judged.clear:,} clear spots (lossy demands {percent(judged.top1_limit)})",
            )
        )  # fmt: skip
    return join(*(join("; " if i else "", text) for i, text in enumerate(parts)), ".")


def numbers(rows: Rows) -> Markup:
    """The model's totals, large."""
    cost = model(rows)
    before, after = sizes(rows)
    error = relative_error(cost)
    tiles = [
        ("SQNR", figure(cost.sqnr, decibels(cost.sqnr)), "dB; 3 more is half the noise"),
        ("rms error", figure(error, percent(error)), "of the values' rms"),
        ("squared error", figure(cost.error_squares, magnitude(cost.error_squares)),
         f"of {magnitude(cost.value_squares)}"),
        ("largest error", figure(cost.largest_error, magnitude(cost.largest_error)),
         "of any value"),
        ("saturated", figure(cost.saturated, f"{cost.saturated:,}"),
         _of_values(cost, cost.saturated)),
        ("flushed", figure(cost.flushed, f"{cost.flushed:,}"), _of_values(cost, cost.flushed)),
        ("exact blocks", figure(cost.exact_share, percent(cost.exact_share)),
         f"of {cost.blocks:,}"),
        ("bytes", figure(after, size(after)), f"from {size(before)}, scales included"),
    ]  # fmt: skip
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("b", value), tag("small", note))
            for name, value, note in tiles
        ),
        class_="numbers",
    )


def _of_values(cost: Cost, count: int) -> str:
    return f"{percent(part(count, cost.values))} of {cost.values:,} values"


def prompts(judged: Closeness) -> Markup:
    """The comparison in full."""
    body, most = [], max((prompt.kl or 0.0 for prompt in judged.prompts), default=0.0)
    for i, prompt in enumerate(judged.prompts):
        mean, highest = (
            tag("td", "" if kl is None else figure(kl, magnitude(kl)), class_="number")
            for kl in (prompt.kl, prompt.worst_kl)
        )
        length = tag("td", bar(prompt.kl or 0.0, most), class_="barred")
        same = f"{prompt.same} of {prompt.clear}"
        body.append(
            tag(
                "tr", tag("th", str(i), scope="row"), tag("td", str(prompt.spots), class_="number"),
                length, mean, highest, tag("td", same, class_="number"),
            )
        )  # fmt: skip
    head = ("prompt", "spots", "mean KL, nats", "", "highest KL", "likeliest token the same")
    return join(
        tag("p", f"Gate {judged.gate} ({judged.why}): ", measured(judged)),
        *(tag("p", f"Not met: {demand}.") for demand in judged.broken),
        table(head, body, "names"),
        tag("p", "KL divergence of the next-token distributions at the spots that the fingerprint"
            " keeps; a clear spot is one whose likeliest token is well ahead.", class_="soft"),
    )  # fmt: skip
