"""JSON from strangers: what json.loads lets through, and what it would cost."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4_quant.strict_json import clip, parse, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
)  # fmt: skip


@given(VALUES, st.booleans())
def test_reads_what_json_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse(text, max_values=10_000) == value


@given(st.binary(max_size=200) | st.text('{}[]":,0-.eE1\\uDd8ntrf ', max_size=60).map(str.encode))
@example(b'"\\ud800"')
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b"9" * 5000)
def test_raises_a_short_value_error_or_gives_what_json_gives(text: bytes) -> None:
    try:
        value = parse(text, max_values=10_000)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) <= 200 and str(error).isprintable()
    else:
        assert value == json.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 1}', "the name 'a' occurs twice"),
        (b'[{"x": {"a": 1, "b": 2, "a": 3}}]', "the name 'a' occurs twice"),
        (b'{"\\u0061": 1, "a": 1}', "occurs twice"),
        (b"NaN", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udc00x": 1}', "surrogates not allowed"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b"1" * 5000, "thousands of digits"),
        (b'"\xff"', "can't decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("[1]".encode("utf-16"), "can't decode"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"\x00", "Expecting value"),
    ],
)
def test_refuses(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text, max_values=10_000)


@pytest.mark.parametrize("text", [b"[-0]", b"[-1]", b"[1.0]", b"[1e3]", b"[1E0]", b"[-1.5]"])
def test_integers_only(text: bytes) -> None:
    parse(text, max_values=10)
    with pytest.raises(ValueError, match="not an integer"):
        parse(text, max_values=10, integers_only=True)


def test_a_minus_in_a_string_is_no_sign() -> None:
    assert parse(b'{"a-b": [0, 10]}', max_values=10, integers_only=True) == {"a-b": [0, 10]}


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":1},', b'"ab",', b"0,"])
def test_a_bomb_costs_nothing(unit: bytes) -> None:
    text = b"[" + unit * ((16 << 20) // len(unit)) + b"0]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 2,000,000 values"):
            parse(text, max_values=2_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_texts_for_errors_are_short_and_on_one_line() -> None:
    assert clip("plain.name") == "plain.name"
    assert clip("x" * 100) == "x" * 57 + "..."
    assert clip("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "too long to show"
    assert shown(10**5000) == "too long to show"
    assert shown([1] * 9) == "a list of 9 values" and shown([1, "a"]) == "[1, 'a']"
    assert shown(dict.fromkeys(range(9))) == "an object of 9 values"
    while nested:
        nested = nested.pop()  # type: ignore[assignment]
