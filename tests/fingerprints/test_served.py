"""What served models said, imported."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_quant.errors import UnreadableError
from dsv4_quant.fingerprints import served
from dsv4_quant.fingerprints.compare import compare
from dsv4_quant.fingerprints.document import Fingerprint, Spot
from dsv4_quant.fingerprints.file import to_json
from dsv4_quant.fingerprints.gates import broken
from dsv4_quant.fingerprints.parse import read_fingerprint
from dsv4_quant.fingerprints.record import Recording
from dsv4_quant.fingerprints.served import import_served, parse_served


def said(top: Any, tokens: Any = (5, 6, 7), position: Any = 2, **more: Any) -> dict[str, Any]:
    spots = [{"position": position, "top": top}]
    prompts = [{"tokens": list(tokens), "spots": spots}]
    return {"format": "dsv4-served", "version": 1, "prompts": prompts, **more}


def test_log_probabilities() -> None:
    made = parse_served(said([[9, -0.5], [3, -1.5]], source="a server"), "deployed", "bfloat16")
    assert made.spots == ((Spot((9, 3), (-0.5, -1.5)),),)
    assert (made.script.prompts, made.script.spots) == (((5, 6, 7),), ((2,),))
    assert (made.script.arithmetic, made.script.activations) == ("deployed", "bfloat16")
    assert made.source == "a server" and made.measured is None


@pytest.mark.parametrize(
    "top",
    [[9, 3, 4], [[9, 0.0], [3, -9999.0], [4, -9999]], [[9, 0], [3, -9999.0], [4, -9999.0]]],
    ids=["ids", "placeholders", "integers"],
)
def test_orders_alone(top: Any) -> None:
    assert parse_served(said(top)).spots == ((Spot((9, 3, 4), ()),),)


def test_the_chosen_token_alone_at_zero_is_an_order() -> None:
    assert parse_served(said([[9, 0.0]])).spots == ((Spot((9,), ()),),)
    assert parse_served(said([[9, -0.25]])).spots == ((Spot((9,), (-0.25,)),),)


def test_round_trip(tmp_path: Path) -> None:
    source, out = tmp_path / "log.json", tmp_path / "f.json"
    source.write_text(json.dumps(said([[9, -0.5], [3, -1.5]], source="a server")))
    made = import_served(source)
    out.write_bytes(to_json(made))
    assert read_fingerprint(out) == made
    assert out.stat().st_size < 1024


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([], "not an object"),
        ({"format": "dsv4-served"}, "no 'version'"),
        (said([[9, -0.5]]) | {"version": 2}, "version is 2"),
        (said([[9, -0.5]]) | {"format": "openai"}, "format is 'openai'"),
        (said([[9, -0.5]], position=3), "from 0 to 2"),
        (said([[9, -0.5]], tokens=["hello"]), "not an integer"),
        (said([]), "1 to 20 entries"),
        (said([[i, -4.0] for i in range(21)]), "1 to 20 entries"),
        (said([[9, -1.5], [3, -0.5]]), "not sorted"),
        (said([[9, -0.5], 3]), "for some ids only"),
        (said([[9, -0.5], [9, -1.5]]), "names a token twice"),
        (said([[9, 12.5], [3, 11.0]]), "are they logits"),
        (said([[9, -0.1], [3, -0.2]]), "more than 1 together"),
        (said([[9, "-0.1"]]), "not a number"),
        (said([[9, -0.5]], source="a\nb"), "source"),
        (said([[9, -0.5]], surprise=1), "unknown key"),
    ],
)
def test_what_cannot_be(raw: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UnreadableError, match=says):
        import_served(path)


def test_the_form_in_the_docstring_is_the_form() -> None:
    doc = served.__doc__ or ""
    text = doc[doc.index("{") : doc.rindex("}") + 1]
    text = text.replace("      (a line of text, may be left out)", "").replace(", ...", "")
    raw = json.loads(text)
    raw["prompts"][0]["tokens"] *= 6
    assert [spot.ids for spot in parse_served(raw).spots[0]] == [(1437, 270), (16,)]


def as_served(recording: Recording, *, order: bool = False, sure: bool = False) -> Fingerprint:
    """What a server would say that runs this very checkpoint; or one that is always sure."""
    prompts = []
    script = recording.fingerprint.script
    for tokens, places, rows in zip(
        script.prompts, script.spots, recording.fingerprint.spots, strict=True
    ):
        spots = []
        for position, spot in zip(places, rows, strict=True):
            logprobs = [-0.1, *[-4.0] * 4] if sure else [logit - spot.lse for logit in spot.logits]
            pairs = [[i, round(p, 4)] for i, p in zip(spot.ids, logprobs, strict=False)][:5]
            spots.append({"position": position, "top": list(spot.ids[:5]) if order else pairs})
        prompts.append({"tokens": list(tokens), "spots": spots})
    return parse_served({"format": "dsv4-served", "version": 1, "prompts": prompts})


def test_a_server_of_the_same_weights_holds(recording: Recording) -> None:
    found = compare(as_served(recording), recording)
    assert not found.steps and not found.is_equal
    assert found.kl is not None and found.kl < 1e-6
    assert not broken(found, "lossy")


def test_a_server_of_other_weights_does_not(recording: Recording) -> None:
    found = compare(as_served(recording, sure=True), recording)
    assert found.kl is not None and found.kl > 0.1
    assert broken(found, "lossy")


def test_an_order_is_judged_where_a_token_is_clearly_ahead(recording: Recording) -> None:
    served_order = as_served(recording, order=True)
    found = compare(served_order, recording)
    ahead = [np.sort(row)[-1] - np.sort(row)[-2] for rows in recording.logits for row in rows]
    assert found.clear == sum(gap >= 1 for gap in ahead) > 0
    assert found.kl is None and found.top1 == 1
    assert not broken(found, "lossy")
    wrong = [Spot(spot.ids[1:], ()) for prompt in served_order.spots for spot in prompt]
    counted = iter(wrong)
    shuffled = tuple(tuple(next(counted) for _ in prompt) for prompt in served_order.spots)
    other = Fingerprint("t", served_order.script, shuffled, None)
    assert compare(other, recording).top1 == 0
    assert broken(compare(other, recording), "lossy")


def test_where_nothing_can_be_judged_nothing_holds(recording: Recording) -> None:
    flat = replace(recording, logits=tuple(np.zeros_like(rows) for rows in recording.logits))
    found = compare(as_served(recording, order=True), flat)
    assert (found.kl, found.top1) == (None, None)
    assert "no spot" in broken(found, "lossy")[0]
    assert math.isclose(found.far(0), 0)
