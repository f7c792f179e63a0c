"""HTML whose text is escaped unless it is known to be HTML."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path


class Markup(str):
    """HTML, as opposed to text."""


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An element; `children` that are no `Markup` are escaped. ``class_`` is ``class``."""
    return Markup(f"<{name}{_written(attributes)}>{joined(children)}</{name}>")


def _written(attributes: dict[str, str]) -> str:
    names = [key.rstrip("_").replace("_", "-") for key in attributes]
    return "".join(f' {key}="{escape(value)}"' for key, value in zip(names, attributes.values()))


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


def picture(path: Path, alternative: str, **attributes: str) -> Markup:
    """A PNG or GIF itself, inside the page; attributes as of `tag`."""
    data, kind = b64encode(path.read_bytes()).decode(), path.suffix.removeprefix(".")
    attributes = {"src": f"data:image/{kind};base64,{data}", "alt": alternative, **attributes}
    return Markup(f"<img{_written(attributes)}>")


def section(title: str, *children: str, note: str = "") -> Markup:
    """A part of the page under its heading, with a note below."""
    notes = [tag("p", note, class_="note")] if note else []
    return tag("section", tag("h2", title), *children, *notes)
