"""A launched study, and all that is needed to judge any mix of its models again."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from expertdiff import checkpoints
from expertdiff.analysis.mixes import Mixer, Scores
from expertdiff.data.base import Data
from expertdiff.describe import build
from expertdiff.diffusion.samplers import Sampler
from expertdiff.evaluation.judge import Judge
from expertdiff.files import replacing
from expertdiff.methods.stitched import Evaluation
from expertdiff.report.study import BASELINE, Job, Study, read_study


@dataclass(frozen=True)
class Trained:
    """A study's folder, what was trained, and how its models are judged.

    Attributes:
        folder: of the study.
        study: its jobs.
        evaluation: how samples are drawn and judged.
        data: whose reference items they are compared with.
        precision: of the networks.
    """

    folder: Path
    study: Study
    evaluation: Evaluation
    data: Data
    precision: str

    @classmethod
    def open(
        cls, folder: Path, samples: int | None = None, seeds: Sequence[int] | None = None
    ) -> "Trained":
        """What was launched in `folder`; samples and seeds by default as it was launched.

        Raises:
            ValueError: no study, or a job of it was never started, or it has no judge.
        """
        folder = Path(folder)
        study = read_study(folder)
        for name in study.jobs:
            if not (folder / name / "done.json").is_file():
                raise ValueError(f"{folder / name} is not trained: run expertdiff launch first")
        file = folder / next(iter(study.jobs)) / "job.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if (block := config["study"]["evaluation"]) is None:
            raise ValueError(f"{file} has no study.evaluation: say how models are to be judged")
        evaluation = Evaluation(
            build(block["sampler"], Sampler),
            block["judge"] and build(block["judge"], Judge),
            block["samples"] if samples is None else samples,
            tuple(block["seeds"] if seeds is None else seeds),
            block["batch_size"],
        )
        data = build(config["data"], Data)
        return cls(folder, study, evaluation, data, str(config["trainer"]["precision"]))

    def judged_as(self, other: "Trained") -> "Trained":
        """The same models judged as those of `other`.

        Raises:
            ValueError: they were trained on other data.
        """
        if self.data.identity() != other.data.identity():
            raise ValueError(
                f"{self.folder} was trained on other data than {other.folder}: "
                "compare studies of the same data"
            )
        return replace(self, evaluation=other.evaluation, data=other.data)

    def mixer(self) -> Mixer:
        """What scores mixes of this study's experts; scores are kept in its folder."""
        scores = self.folder / "scores.json"
        return Mixer(self.study.partition, self.evaluation, self.data, scores, self.precision)

    @property
    def baseline(self) -> Job:
        """The job of the whole chain.

        Raises:
            ValueError: there is none.
        """
        if BASELINE not in self.study.jobs:
            raise ValueError(f"{self.folder} has no baseline to compare with: launch it with one")
        return self.study.jobs[BASELINE]

    def kept(self, job: Job) -> dict[int, Path]:
        """The checkpoints of a job by their step, in order.

        Raises:
            ValueError: fewer than two were kept.
        """
        paths = (self.folder / job.name / "checkpoints").glob("step-*.ckpt")
        steps = {checkpoints.step_of(path): path for path in paths}
        if len(steps) < 2:
            raise ValueError(
                f"{self.folder / job.name} kept {len(steps)} checkpoints, which is no curve: "
                "train it with --checkpoint.keep null"
            )
        return dict(sorted(steps.items()))


def told(scores: Scores) -> dict[str, Any]:
    """Mean and standard deviation over the sampling seeds of each distance, as columns."""
    columns = {}
    for name, values in scores.items():
        columns[name] = mean(values)
        columns[f"{name} std"] = stdev(values) if len(values) > 1 else None
    return columns


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV; the first has all columns."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """These columns of rows, aligned."""
    text = [list(columns)] + [[_text(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
