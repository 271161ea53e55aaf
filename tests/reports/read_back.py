"""An HTML page as a tree, strictly: what is opened is closed, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from dsv4_quant.reports.markup import VOID


@dataclass
class Node:
    """An element; children are elements and text."""

    name: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, name: str, class_: str | None = None) -> Iterator[Node]:
        """In the page's order."""
        for child in self.children:
            if isinstance(child, Node):
                if child.name == name and class_ in (None, child.attributes.get("class")):
                    yield child
                yield from child.all(name, class_)

    def one(self, name: str, **attributes: str) -> Node:
        (found,) = (
            node for node in self.all(name) if attributes.items() <= node.attributes.items()
        )
        return found

    def rows(self) -> list[list[Node]]:
        """A table's cells, without its head."""
        (body,) = self.all("tbody")
        return [[cell for cell in row.children if isinstance(cell, Node)] for row in body.all("tr")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is no HTML")

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def tree(html: str) -> Node:
    """Fails if the page is not well-formed."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def section(root: Node, title: str) -> Node:
    """By its heading."""
    (found,) = (node for node in root.all("section") if next(node.all("h2")).text == title)
    return found
