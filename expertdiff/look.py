"""How our figures look."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

INK = "#1f2328"
"""Of all text and lines; in a page it becomes the page's own text colour."""


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn and saved alike, without a change of matplotlib's global state."""
    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    look = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context({**colours, **look, "svg.hashsalt": "expertdiff"}):
        yield
