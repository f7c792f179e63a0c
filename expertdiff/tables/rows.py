"""One row of a table of 2-D models, as it lies on disk and as it is shown."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from expertdiff.files import write_json, write_text

SCORES = {
    "loss": "evaluation loss",
    "excess": "loss above the exact denoiser",
    "KL": "KL(real || samples)",
    "reverse KL": "KL(samples || real)",
    "sliced W1": "sliced W1",
    "MMD^2": "MMD^2",
    "NLL": "-log likelihood",
    "modes": "modes hit",
    "within": "share at a mode",
    "tv": "TV of mode shares",
    "width": "mode width",
    "sampling": "sampling seconds",
}
"""The keys of `Row.scores` in the order of the columns, and what they are called."""


DIRECTIONS = ("KL", "reverse KL")
"""The scores that a verdict is about."""


@dataclass
class Row:
    """A model, or a floor, on one set under one schedule.

    Attributes:
        set: the data set, as ``dino``.
        schedule: as named by the table.
        model: as named by the table; ``fresh`` and ``exact`` are the floors.
        parameters: of the network; ``None`` for a floor.
        seconds: of training, a seed; ``None`` for a floor.
        seeds: of training (of sampling, for a floor).
        scores: for each key of `SCORES` that applies, one number a seed.
        folder: where its bundles, samples and pictures lie, one folder ``seed-<s>`` a seed.
    """

    set: str
    schedule: str
    model: str
    parameters: int | None
    seconds: float | None
    seeds: list[int]
    folder: str
    scores: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, key: str) -> float | None:
        """Over the seeds; ``None`` where the score does not apply."""
        return float(np.mean(self.scores[key])) if self.scores.get(key) else None

    def std(self, key: str) -> float | None:
        """Over the seeds; ``None`` for fewer than two."""
        values = self.scores.get(key, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def text(self, key: str, digits: int = 3) -> str:
        """``0.123 ± 0.004``, or a dash."""
        mean, std = self.mean(key), self.std(key)
        if mean is None:
            return "-"
        return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def save(rows: Sequence[Row], folder: Path) -> None:
    """``rows.json`` for programs that go on, and ``table.csv`` for people's."""
    write_json(folder / "rows.json", [asdict(row) for row in rows])
    text = io.StringIO()
    writer = csv.writer(text)
    heads = [f"{key} {part}" for key in SCORES for part in ("mean", "std")]
    facts = ("set", "schedule", "model", "parameters", "seconds")
    writer.writerow([*facts, "seeds", *heads])
    for row in rows:
        numbers = [value for key in SCORES for value in (row.mean(key), row.std(key))]
        writer.writerow([*(getattr(row, fact) for fact in facts), len(row.seeds), *numbers])
    write_text(folder / "table.csv", text.getvalue())
