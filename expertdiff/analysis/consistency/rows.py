"""What is told of each set of samples, and of the controls beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from expertdiff.analysis.consistency.likeness import Likeness, Scores
from expertdiff.analysis.consistency.pair import Pair
from expertdiff.data.base import Data

SHUFFLED, HELD_OUT = "B, shuffled", "held-out items"
"""The controls."""

PART = 1000
"""Training items whose features are held at a time."""

COLUMNS = {"to A": "to_a", "to B": "to_b", "to nearest": "nearest"}
"""Scores in the order in which they are shown, and where they stand in a row."""


@dataclass
class Row:
    """What is told of one set of items.

    Attributes:
        name: of the set.
        of_b: the intervals in which B drew it; ``None`` for a control.
        calls: of B while one sample is drawn; ``None`` for a control.
        to_a: how alike these items and A's samples are; empty where they are no pairs.
        to_b: likewise.
        nearest: likewise, to the training item nearest to each; empty where not asked for.
    """

    name: str
    of_b: list[int] | None = None
    calls: int | None = None
    to_a: Scores = field(default_factory=dict)
    to_b: Scores = field(default_factory=dict)
    nearest: Scores = field(default_factory=dict)


def compared(
    pair: Pair,
    drawn: dict[str, Tensor],
    likeness: Likeness,
    data: Data | None,
    training: Tensor | None,
) -> list[Row]:
    """One row a set of samples, then the controls.

    B's samples in another order tell how alike samples of unlike noise are.

    Args:
        pair: the models.
        drawn: their samples.
        likeness: how these are compared.
        data: whose items they are compared with, too, if any.
        training: those of its training items [M, ...] that are searched for the nearest.
    """
    sets = {name: likeness.features(samples) for name, samples in drawn.items()}
    # One mean for all, so that every cosine is of the same features.
    mean = torch.cat([sets["A"], sets["B"]]).mean(0)
    sets = {name: features - mean for name, features in sets.items()}
    sets[SHUFFLED] = sets["B"][pair.shuffled()]
    calls = pair.calls()
    rows = [Row(name, of_b, sum(calls[i] for i in of_b)) for name, of_b in pair.models.items()]
    rows.append(Row(SHUFFLED))
    for row in rows:
        row.to_a = likeness.pairs(sets[row.name], sets["A"])
        row.to_b = likeness.pairs(sets[row.name], sets["B"])
    return rows if data is None else with_nearest(rows, sets, likeness, data, training, mean)


def with_nearest(
    rows: Sequence[Row],
    sets: dict[str, Tensor],
    likeness: Likeness,
    data: Data,
    training: Tensor,
    mean: Tensor,
) -> list[Row]:
    """The rows, where A and B are also compared with the nearest training items.

    So are held-out items, as many as samples: they tell how near an item comes that is no copy.

    Args:
        rows: of A, of B and of others.
        sets: the features [N, D] of A and B, less their mean.
        likeness: how they are compared.
        data: see `compared`.
        training: see `compared`.
        mean: [D], taken off the features of all items.
    """
    rows = [*rows, Row(HELD_OUT)]
    held_out = data.real("validation")
    asked = {name: sets[name] for name in ("A", "B")}
    asked[HELD_OUT] = likeness.features(held_out[: len(sets["A"])]) - mean
    parts = (features - mean for features in _parts(training, data.flip, likeness))
    values = likeness.nearest(torch.cat(list(asked.values())), parts)
    nearest = dict(zip(asked, values.split([len(features) for features in asked.values()])))
    for row in rows:
        if row.name in nearest:
            row.nearest = likeness.summary(nearest[row.name])
    return rows


def _parts(training: Tensor, flips: bool, likeness: Likeness) -> Iterator[Tensor]:
    """Features of training items, and of their mirror images where training sees these."""
    for part in tqdm(training.split(PART), desc="training items", leave=False):
        for flip in (False, True) if flips else (False,):
            yield likeness.features(part.flip(-1) if flip else part)


def table(rows: Sequence[Row]) -> str:
    """All scores as text, a line a row."""
    columns = [
        ["", *(row.name for row in rows)],
        ["calls of B", *("-" if row.calls is None else str(row.calls) for row in rows)],
    ]
    for title, name in COLUMNS.items():
        scores = [getattr(row, name) for row in rows]
        for key in max(scores, key=len):
            numbers = (f"{score[key]:.4f}" if key in score else "-" for score in scores)
            columns.append([f"{key} {title}", *numbers])
    first, *others = (max(map(len, column)) for column in columns)
    lines = (
        "  ".join([name.ljust(first), *map(str.rjust, cells, others)])
        for name, *cells in zip(*columns)
    )
    return "\n".join(lines)
