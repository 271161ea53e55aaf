"""The page, parsed back: well-formed, escaped, the same every time, and its numbers the costs'."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dsv4_quant.formats.blocks import BF16
from dsv4_quant.formats.cost import Cost, total
from dsv4_quant.reports.closeness import closeness
from dsv4_quant.reports.colours import PALETTE, index
from dsv4_quant.reports.field import ALL, make_field
from dsv4_quant.reports.figures import relative_error
from dsv4_quant.reports.page import page
from dsv4_quant.reports.png import address, png
from dsv4_quant.reports.recast import Recast, apart, by_layer, by_role, model, sizes, worst
from tests.reports.read_back import Node, section, tree
from tests.reports.synthetic import FP8, RUN, catalogue, comparison, cost, tiny

JUDGED = closeness(comparison(), "lossy", "it was asked for")


@cache
def rows() -> tuple[Recast, ...]:
    return tuple(tiny())


@cache
def made() -> Node:
    return tree(page(rows(), RUN, JUDGED))


def held(cells: Sequence[Node]) -> list[float]:
    """What the data elements of some cells say."""
    found = [node for cell in cells for node in cell.all("data")]
    for node in found:
        assert_shown(node)
    return [float(node.attributes["value"]) for node in found]


def assert_shown(node: Node) -> None:
    """What people read is what is said in full, rounded."""
    value, text = float(node.attributes["value"]), node.text.replace(",", "").removesuffix(" dB")
    if text in ("exact", "inf", "-inf", "NaN") or text[0] in "<>" or text.endswith("B"):
        return
    shown = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    assert shown == pytest.approx(value, rel=0.006, abs=0.00001)


def expected(cost: Cost) -> list[float]:
    return [cost.sqnr, relative_error(cost), cost.largest_error, cost.saturated, cost.flushed,
            cost.exact_share]  # fmt: skip


def test_the_worst_ten() -> None:
    table = section(made(), "The worst 10 weights")
    found = {cells[0].text: held(cells) for cells in table.rows()}
    assert list(found) == [row.name for row in worst(rows(), 10)]
    assert found == {row.name: expected(row.cost) for row in worst(rows(), 10)}


def test_layers() -> None:
    table = section(made(), "By layer").rows()
    groups = by_layer(rows())
    assert [cells[0].text for cells in table] == list(groups)
    for cells, group in zip(table, groups.values(), strict=True):
        (lowest,) = worst(group, 1)
        figures = [len(group), *expected(total(row.cost for row in group)), lowest.cost.sqnr]
        assert held(cells) == figures
        assert all(word in lowest.name for word in cells[-2].text.removeprefix("expert ").split())


def test_roles() -> None:
    table = section(made(), "Error by role").rows()
    groups = by_role(rows())
    whole = model(rows()).error_squares
    assert [cells[0].text for cells in table] == list(groups)
    errors = [relative_error(model(group)) for group in groups.values()]
    for cells, group, error in zip(table, groups.values(), errors, strict=True):
        cost = model(group)
        count, shown, sqnr, squares, share, *rest = held(cells)
        assert [count, shown, sqnr, squares] == [len(group), error, cost.sqnr, cost.error_squares]
        assert share == pytest.approx(cost.error_squares / whole)
        assert rest == expected(cost)[2:]
        (strip,) = (node for cell in cells for node in cell.all("rect"))
        width = float(strip.attributes["width"])
        assert width == pytest.approx(100 * error / max(errors), abs=0.006)


def test_totals() -> None:
    cost = model(rows())
    (box,) = made().all("div", "numbers")
    before, after = sizes(rows())
    assert held([box]) == [cost.sqnr, relative_error(cost), cost.error_squares,
                           cost.largest_error, cost.saturated, cost.flushed, cost.exact_share,
                           after]  # fmt: skip
    assert f"{cost.blocks:,}" in box.text and f"{cost.values:,}" in box.text
    assert before > after


def test_other_weights() -> None:
    table = section(made(), "SQNR of the weights that are no experts, dB")
    names = [node.text for node in next(table.all("thead")).all("th")][1:]
    found = {}
    for layer, *cells in table.rows():
        for name, cell in zip(names, cells, strict=True):
            if cell.children:
                found[f"{layer.text}.{name}.weight"] = held([cell])
    others = [row for row in rows() if row.spec.expert is None]
    assert found == {row.name: [row.cost.sqnr] for row in others}


def test_exponents() -> None:
    part = section(made(), "Scale exponents")
    known = {}
    for title, table in zip(part.all("h3"), part.all("table"), strict=True):
        name = title.text.partition(",")[0]
        known[name] = Counter({int(s.text): int(n.text.replace(",", "")) for s, n in table.rows()})
    groups = {str(row.after) for row in rows()}
    assert known == {
        name: total(row.cost for row in rows() if str(row.after) == name).exponents
        for name in groups
    }
    bars = [node.text for svg in part.all("svg") for node in svg.all("title")]
    assert len(bars) == sum(map(len, known.values()))


def test_cells_are_the_costs_rounded() -> None:
    data = json.loads(made().one("script", id="cells").text)
    assert data["matrices"] == ["w1", "w2", "w3"]
    seen = 0
    for row in rows():
        if row.spec.expert is None:
            continue
        layer = data["layers"].index(row.layer)
        cell = {key: of[layer][row.spec.expert] for key, of in data["cells"][row.within].items()}
        assert_cell(cell, row.cost)
        seen += 1
    assert seen == 3 * len(data["layers"]) * len(data["cells"]["w1"]["sqnr"][0])


def assert_cell(cell: dict[str, Any], cost: Cost) -> None:
    assert cell["sqnr"] == ("exact" if cost.sqnr == math.inf else round(cost.sqnr * 100))
    assert cell["largest"] == pytest.approx(cost.largest_error, rel=0.0051)
    assert (cell["saturated"], cell["flushed"]) == (cost.saturated, cost.flushed)
    assert cell["exact"] == pytest.approx(100 * cost.exact_share, rel=0.0051)
    assert (cell["exact"] == 100) == (cost.exact_blocks == cost.blocks)


def test_pictures_are_the_cells() -> None:
    field = make_field(rows())
    maps = [node.one("image") for i in range(4) for node in made().all("div", f"map map-{i}")]
    for image, (name, view) in zip(maps, field.views.items(), strict=True):
        cells = [bytes(index(cost and cost.sqnr) for cost in costs) for costs in view]
        assert image.attributes["href"] == address(png(cells, PALETTE)), name
    whole = field.views[ALL][2][5]
    parts = [row.cost for row in rows() if ".".join(row.name.split(".")[:5]) ==
             "layers.2.ffn.experts.5"]  # fmt: skip
    assert whole is not None and len(parts) == 3
    assert whole == replace(total(parts), exponents=Counter())


def test_experts_apart_are_named_beside_their_layer() -> None:
    texts = [node.text for node in next(made().all("div", "map map-1")).all("text")]
    for row in worst([row for row in rows() if row.within == "w1"], 1):
        assert f"{row.spec.expert}: {row.cost.sqnr:.2f}" in texts


def test_findings_say_what_stands_apart_and_what_the_gate_says() -> None:
    said = [node.text for node in next(made().all("ul")).all("li")]
    assert "18.39 dB" in said[0] and "Normally distributed values would give 19.0" in said[0]
    assert said[2].startswith("2 of 228 weights stand apart")
    assert all(one.row.name in said[2] for one in apart(rows()))
    assert said[3].startswith("The lossy gate holds: mean KL divergence 0.0295 nats")
    without = tree(page(rows(), RUN))
    assert "was not compared" in [node.text for node in next(without.all("ul")).all("li")][3]
    bad = tree(page(rows(), RUN, closeness(comparison(0.5), "lossy", "")))
    assert "The lossy gate does not hold: mean KL" in next(bad.all("ul")).text


def test_prompts() -> None:
    table = section(made(), "Fingerprint comparison").rows()
    for cells, prompt in zip(table, JUDGED.prompts, strict=True):
        assert cells[1].text == str(prompt.spots)
        assert held(cells) == [prompt.kl, prompt.worst_kl]
        assert cells[-1].text == f"{prompt.same} of {prompt.clear}"


def test_heading() -> None:
    names = [node.text for node in next(made().all("dl")).all("dt")]
    values = [node.text for node in next(made().all("dl")).all("dd")]
    facts = dict(zip(names, values, strict=True))
    assert facts["source"] == RUN.source and facts["output's value digest"] == "a0" * 32
    assert facts["formats"] == (
        "fp8 128x128 e8m0 → fp4 1x32 e8m0 (168); bf16 → fp8 128x128 e8m0 (60)"
    )


def walk(node: Node) -> list[Node]:
    inner = [child for child in node.children if isinstance(child, Node)]
    return [node, *(one for child in inner for one in walk(child))]


HOSTILE = "</script><script>alert(1)</script>\"'&<!--"


def test_everything_is_escaped() -> None:
    named = [
        replace(row, spec=row.spec._replace(name=row.name.replace(".", f"{HOSTILE}.")))
        for row in rows()
    ]
    run = replace(RUN, source=HOSTILE, output=HOSTILE, rule=HOSTILE, more={HOSTILE: HOSTILE},
                  source_digest=HOSTILE, output_digest=HOSTILE, tool=HOSTILE)  # fmt: skip
    judged = replace(JUDGED, why=HOSTILE, broken=(HOSTILE,), gate=HOSTILE)
    root = tree(page(named, run, judged))
    assert [node.attributes.get("id") for node in root.all("script")] == ["cells", None]
    assert next(root.all("title")).text.endswith(HOSTILE)
    assert HOSTILE in section(root, "The worst 10 weights").text
    data = json.loads(root.one("script", id="cells").text)
    assert (
        data["layers"][3] == f"layers{HOSTILE}.3{HOSTILE}" and data["matrices"][0] == "w1" + HOSTILE
    )
    for part in (lambda node: {node.name}, lambda node: set(node.attributes)):
        assert set.union(*map(part, walk(root))) == set.union(*map(part, walk(made())))


def test_the_policy_lets_only_the_pages_own_script_run() -> None:
    policy = made().one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    (script,) = (node for node in made().all("script") if not node.attributes)
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_nothing_is_fetched_and_nothing_runs_inline() -> None:
    html = page(rows(), RUN, JUDGED)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    assert not re.search(r"<[^>]*\son\w+=", html)


def test_ids_are_unique_and_labels_find_them() -> None:
    nodes = walk(made())
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {node.attributes["for"] for node in made().all("label")} <= set(ids)
    for svg in made().all("svg"):
        assert "aria-label" in svg.attributes or svg.attributes.get("aria-hidden") == "true"


def test_the_same_input_gives_the_same_bytes_in_any_order() -> None:
    mixed = random.Random(3).sample(rows(), len(rows()))
    assert page(mixed, RUN, JUDGED) == page(rows(), RUN, JUDGED)


@pytest.mark.parametrize("kind", ["experts", "others", "exact", "one", "undefined"])
def test_odd_runs_have_a_page(kind: str) -> None:
    some: list[Recast] = list(rows())
    if kind in ("experts", "others"):
        some = [row for row in some if (row.spec.expert is not None) == (kind == "experts")]
    elif kind == "exact":
        some = [replace(row, cost=Cost(9, 1.0, blocks=3, exact_blocks=3)) for row in some]
    elif kind == "one":
        some = some[-1:]
    else:
        some[0] = replace(some[0], cost=replace(some[0].cost, value_squares=math.nan))
        some[1] = replace(some[1], cost=replace(some[1].cost, value_squares=0.0))
        some[2] = replace(some[2], cost=replace(some[2].cost, error_squares=math.inf))
    root = tree(page(some, RUN))
    titles = [node.text for node in root.all("h2")]
    assert ("SQNR by layer and expert" in titles) == any(r.spec.expert is not None for r in some)
    if kind == "exact":
        assert "exact, no value changed" in next(root.all("ul")).text


def test_exponents_that_only_the_manifest_knows() -> None:
    bare = [replace(row, cost=replace(row.cost, exponents=Counter())) for row in rows()]
    part = section(tree(page(bare, RUN, exponents=Counter({-6: 70, -5: 7}))), "Scale exponents")
    assert [[cell.text for cell in cells] for cells in part.rows()] == [["-6", "70"], ["-5", "7"]]
    assert "Not known" in section(tree(page(bare, RUN)), "Scale exponents").text


def test_the_largest_model_fits_3_megabytes() -> None:
    found = catalogue(None, None, "V4-Pro").specs.values()
    specs = [spec for spec in found if spec.expert is not None]
    rng = np.random.default_rng(1)
    pool = [cost(rng, spec, 18 + i / 50) for i, spec in enumerate(specs[:97])]
    many = [Recast(spec, FP8, pool[i % 97]) for i, spec in enumerate(specs)]
    many += [row for row in tiny(before=FP8, dense=BF16) if row.spec.expert is None]
    assert len(many) > 71_000
    assert len(page(many, RUN, JUDGED).encode()) < 3_000_000
