"""HTML and SVG elements as text. What is not Markup is escaped: names and configs are not ours."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


VOID = frozenset(("meta", "input", "wbr"))


def tag(element: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """``<element attributes>children</element>``.

    Attributes: None is left out, ``_`` becomes ``-``, and one at the end (``class_``) falls away.
    """
    said = "".join(
        f' {name.removesuffix("_").replace("_", "-")}="{escape(text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if element in VOID:
        return Markup(f"<{element}{said}>")
    return Markup(f"<{element}{said}>{join(*children)}</{element}>")


def join(*children: str | Markup) -> Markup:
    """One after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child, quote=False) for child in children
        )
    )


def text(value: str | float) -> str:
    """Coordinates with two decimals at most; ``-0`` is 0."""
    if isinstance(value, float):
        return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
    return str(value)


def figure(value: float, shown: str) -> Markup:
    """A number for people that also says what it is to the last digit."""
    return tag("data", shown, value=repr(value))
