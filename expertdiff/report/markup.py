"""HTML whose text is escaped unless it is known to be HTML."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path


class Markup(str):
    """HTML, as opposed to text."""


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An element; `children` that are no `Markup` are escaped. ``class_`` is ``class``."""
    names = [key.rstrip("_").replace("_", "-") for key in attributes]
    start = "".join(f' {key}="{escape(value)}"' for key, value in zip(names, attributes.values()))
    return Markup(f"<{name}{start}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Markup:
    """The children one after another."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children))


def table(header: list[str], rows: list[list[str]]) -> Markup:
    """A table; the first column names the row."""
    head = tag("tr", *(tag("th", text, scope="col") for text in header))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", text) for text in row[1:]))
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="table")


def png(path: Path, width: int, alternative: str) -> Markup:
    """The picture itself, inside the page, `width` CSS pixels wide."""
    data = b64encode(path.read_bytes()).decode()
    return Markup(
        f'<img src="data:image/png;base64,{data}" width="{width}" alt="{escape(alternative)}">'
    )
