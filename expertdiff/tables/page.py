"""The page of a table of 2-D models: who comes nearest to the data, and who beats its control."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from expertdiff.files import write_text
from expertdiff.report.figures import svg
from expertdiff.report.markup import Markup, joined, picture, section, table, tag
from expertdiff.report.page import page
from expertdiff.tables.pictures import (
    FLOORS,
    colour_of,
    floors_and_models,
    samples_figure,
    score_figure,
)
from expertdiff.tables.rows import DIRECTIONS, SCORES, Row

LOWEST = ("loss", "excess", "NLL")
"""Scores that fresh points do not have: the lowest is the best."""

DIGITS = {"loss": 4, "excess": 4, "MMD^2": 4, "modes": 0, "sampling": 2}
"""After the point, where three would say too little or too much."""

ERRORS = 2
"""Standard errors of a difference below which it may come from the seeds alone."""

READING = (
    "Fresh points are real points drawn anew and scored as samples are. Nearer means nearer to "
    "their score (to 0 while they have none): a KL below theirs is no better than one above. The "
    "exact denoiser is the best that a network could learn, under the same noise schedule and "
    f"sampler. A difference counts when it exceeds {ERRORS} standard errors over the seeds."
)


class Comparison(NamedTuple):
    """A model against its control, by one score.

    Attributes:
        gain: by how much the model is nearer to the target than its control.
        error: the standard error of the difference of the means; ``None`` with a single seed.
    """

    model: Row
    control: Row
    key: str
    gain: float
    error: float | None

    @property
    def outcome(self) -> str:
        """Who is nearer: ``model``, ``control``, or nobody (``equal``) as far as seeds can tell."""
        if self.error is None or abs(self.gain) <= ERRORS * self.error:
            return "equal"
        return "model" if self.gain > 0 else "control"

    def __str__(self) -> str:
        size = f"{abs(self.gain):.3f}"
        nearer = self.model if self.gain > 0 else self.control
        if self.error is None:
            words = f"{nearer.model} nearer by {size}, which a single seed cannot tell from chance"
        elif self.outcome == "equal":
            words = f"no difference beyond the seeds ({size}, standard error {self.error:.3f})"
        else:
            errors = abs(self.gain) / self.error if self.error else math.inf
            words = f"{nearer.model} nearer by {size} ({errors:.1f} standard errors)"
        scores = f"{self.model.text(self.key)} and {self.control.text(self.key)}"
        return f"{self.key} {scores}, {words}"


def write_page(
    rows: Sequence[Row], folder: Path, title: str, how: list[str], pairs: dict[str, str]
) -> Path:
    """Writes ``<folder>/table.html``: a verdict in words, tables, pictures, how it was made.

    One file that needs no network. A table that is not finished gets a page of what is there.

    Args:
        rows: of the table, in the order in which they are shown.
        folder: where an animation ``<set>-<schedule>.gif`` is looked for, too.
        title: of the page.
        how: how every number was made, one line each.
        pairs: the control of each model that has one.

    Returns:
        The file.
    """
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(f"{row.set}, {row.schedule}", []).append(row)
    path = folder / "table.html"
    body = [
        _verdict(cells, pairs),
        *(_cell(name, members, folder, pairs) for name, members in cells.items()),
        section("How every number was made", tag("ul", *(tag("li", line) for line in how))),
    ]
    write_text(path, page(title, *body))
    return path


def comparisons(rows: Sequence[Row], pairs: dict[str, str]) -> list[Comparison]:
    """Every model with a control against it, by KL in both directions.

    Nearer to what fresh points score, or to 0 where none were scored. Rows or scores that are not
    there yet are left out.

    Args:
        rows: of one set and one schedule.
        pairs: the control of each model that has one.
    """
    named = {row.model: row for row in rows}
    couples = [(named[a], named[b]) for a, b in pairs.items() if a in named and b in named]
    return [
        Comparison(model, control, key, gap(control, key, rows) - gap(model, key, rows),
                   _error(model.scores[key], control.scores[key]))
        for model, control in couples
        for key in DIRECTIONS
        if model.scores.get(key) and control.scores.get(key)
    ]  # fmt: skip


def _error(a: list[float], b: list[float]) -> float | None:
    if min(len(a), len(b)) < 2:
        return None
    return math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))


def gap(row: Row, key: str, rows: Sequence[Row]) -> float:
    """How far the mean of a score is from that of the fresh points among `rows`, else from 0."""
    fresh = [other.mean(key) for other in rows if other.model == "fresh"]
    return abs(row.mean(key) - (fresh[0] if fresh and fresh[0] is not None else 0.0))


def nearest(rows: Sequence[Row]) -> Row | None:
    """The model with the smallest sum of gaps of both directions; ``None`` where none is scored."""
    _, models = floors_and_models(rows)
    scored = [row for row in models if all(row.scores.get(key) for key in DIRECTIONS)]
    return min(scored, key=lambda row: sum(gap(row, k, rows) for k in DIRECTIONS), default=None)


def _verdict(cells: dict[str, list[Row]], pairs: dict[str, str]) -> Markup:
    if not cells:
        return tag("p", "Nothing has been scored yet.", class_="verdict")
    parts = []
    for name, rows in cells.items():
        parts.append(tag("p", tag("b", name), ": ", _best(rows)))
        lines = _lines(rows, pairs)
        parts.append(tag("ul", *(tag("li", line) for line in lines)) if lines else Markup())
    every = [c for rows in cells.values() for c in comparisons(rows, pairs)]
    block = tag("div", tag("p", _summary(every)), *parts, class_="verdict")
    return joined([block, tag("p", READING, class_="note")])


def _summary(every: list[Comparison]) -> str:
    if not every:
        return "No model can be compared with a control."
    parts = []
    for key in DIRECTIONS:
        counts = Counter(c.outcome for c in every if c.key == key)
        parts.append(
            f"by {SCORES[key]}, nearer to fresh points {counts['model']}, farther "
            f"{counts['control']}, not to be told apart {counts['equal']}"
        )
    return f"Models against their controls: {'; '.join(parts)}."


def _best(rows: list[Row]) -> str:
    best = nearest(rows)
    named = {row.model: row for row in rows}
    floors = [f"{label} {_both(named[f])}" for f, label in FLOORS.items() if f in named]
    floors += [f"no {label}" for f, label in FLOORS.items() if f not in named]
    known = "; ".join(floors)
    if best is None:
        return f"no model has been scored yet ({known})."
    return f"{best.model} comes nearest with {_both(best)} ({known})."


def _both(row: Row) -> str:
    return ", ".join(f"{key} {row.text(key)}" for key in DIRECTIONS)


def _lines(rows: list[Row], pairs: dict[str, str]) -> list[str]:
    """One line a model that is compared, or that waits for its control."""
    lines: dict[str, str] = {}
    for c in comparisons(rows, pairs):
        start = f"{_sized(c.model)} against {_sized(c.control)}: "
        before = lines.get(c.model.model)
        lines[c.model.model] = f"{before}; {c}" if before else start + str(c)
    present = {row.model for row in rows}
    waiting = [
        f"{model} against {control}: {model if control in present else control} is not there yet"
        for model, control in pairs.items()
        if (model in present) != (control in present)
    ]
    return [*lines.values(), *waiting]


def _sized(row: Row) -> str:
    return row.model + ("" if row.parameters is None else f" ({row.parameters:,})")


def _cell(name: str, rows: list[Row], folder: Path, pairs: dict[str, str]) -> Markup:
    return section(name, _table(rows, pairs), *_figures(rows, folder, pairs))


def _table(rows: list[Row], pairs: dict[str, str]) -> Markup:
    floors, models = floors_and_models(rows)
    keys = [key for key in SCORES if any(row.scores.get(key) for row in rows)]
    best = {key: _best_mean(models, key, rows) for key in keys}
    header = ["model", "parameters", "training seconds", "seeds"]
    lines = []
    for row in [*floors, *models]:
        facts = [_number(row.parameters), _number(row.seconds), str(len(row.seeds))]
        scores = [_score(row, key, row in models and row.mean(key) == best[key]) for key in keys]
        lines.append([_name(row.model, pairs), *facts, *scores])
    return tag("div", table([*header, *(SCORES[key] for key in keys)], lines), class_="scores")


def _best_mean(models: list[Row], key: str, rows: list[Row]) -> float | None:
    """The mean to print in bold; ``None`` where all are equal, or nothing says which is best."""
    # Not a number is the width of modes that were never hit.
    scored = [row for row in models if row.scores.get(key) and math.isfinite(row.mean(key))]
    if len({row.mean(key) for row in scored}) < 2:
        return None
    if key in LOWEST:
        return min(row.mean(key) for row in scored)
    if not any(row.model == "fresh" and row.scores.get(key) for row in rows):
        return None
    return min(scored, key=lambda row: gap(row, key, rows)).mean(key)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _score(row: Row, key: str, bold: bool) -> Markup:
    if not row.scores.get(key):
        return joined(["-"])
    mean, _, std = row.text(key, DIGITS.get(key, 3)).partition(" ± ")
    spread = [tag("small", f"± {std}")] if std else []
    return joined([tag("b", mean) if bold else mean, *spread])


def _name(model: str, pairs: dict[str, str]) -> Markup:
    """The name with its colour in the figure."""
    kind = {"class_": "floor"} if model in FLOORS else {}
    chip = tag("i", style=f"background:{colour_of(model, pairs)}", **kind)
    return joined([chip, FLOORS.get(model, model)])


def _figures(rows: list[Row], folder: Path, pairs: dict[str, str]) -> list[Markup]:
    first, figures = rows[0], []
    if any(row.model not in FLOORS for row in rows):
        figures.append(_figure("Scores", Markup(svg(score_figure(rows, pairs)))))
    if (samples := samples_figure(rows)) is not None:
        figures.append(_figure("Samples of the first seed", Markup(svg(samples))))
    animation = folder / f"{first.set}-{first.schedule}.gif"
    if animation.is_file():
        figures.append(
            _figure("From noise to samples", picture(animation, "animation", class_="smooth"))
        )
    for row in rows:
        gates = Path(row.folder) / f"seed-{row.seeds[0]}" / "gates.png"
        if gates.is_file():
            figures.append(
                _figure(
                    f"Gates of {row.model}, first seed", picture(gates, "gates", class_="smooth")
                )
            )
    return figures


def _figure(caption: str, content: Markup) -> Markup:
    return tag("figure", tag("figcaption", caption), content)
