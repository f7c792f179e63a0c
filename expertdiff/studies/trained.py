"""A launched study, and all that is needed to judge any mix of its models again."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from expertdiff import checkpoints
from expertdiff.analysis.mixes import Mixer, Scores
from expertdiff.data.base import Data
from expertdiff.describe import build
from expertdiff.devices import default_device
from expertdiff.diffusion.guidance import Guidance
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
            ValueError: no study, one of an older version, or a job that is not trained.
        """
        folder = Path(folder)
        study = read_study(folder)
        for job in study.jobs.values():
            if not job.done:
                raise ValueError(f"{folder / job.name} is not trained: run expertdiff launch first")
        if (block := study.facts.get("evaluation")) is None:
            raise ValueError(
                f"{folder / 'study.json'} does not say how models are judged: launch it again"
            )
        evaluation = Evaluation(
            build(block["sampler"], Sampler),
            build(block["judge"], Judge),
            block["samples"] if samples is None else samples,
            tuple(block["seeds"] if seeds is None else seeds),
            block["batch_size"],
            block.get("guidance") and build(block["guidance"], Guidance),
        )
        data = build(study.facts["data"], Data)
        return cls(folder, study, evaluation, data, str(study.facts["settings"]["precision"]))

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

    @property
    def experts(self) -> list[Job]:
        """The jobs of the intervals, cleanest first.

        Raises:
            ValueError: there are none.
        """
        if not self.study.experts:
            raise ValueError(f"{self.folder} has no experts: name a study that trained some")
        return self.study.experts

    def kept(self, job: Job) -> dict[int, Path]:
        """The checkpoints of a job by their step, in order: at equal distances, and the last.

        Those of an interruption or of a round's end would make neighbours on a curve closer.

        Raises:
            ValueError: fewer than two were kept.
        """
        paths = (self.folder / job.name / "checkpoints").glob("step-*.ckpt")
        steps = {checkpoints.step_of(path): path for path in paths}
        every, last = self.study.facts["every_n_steps"], max(steps, default=0)
        kept = {step: steps[step] for step in sorted(steps) if step % every == 0 or step == last}
        if len(kept) < 2:
            raise ValueError(
                f"{self.folder / job.name} kept {len(kept)} checkpoints {every} steps apart, which "
                "is no curve: train it with --checkpoint.keep null, and a --checkpoint.every_n_"
                "steps below its length"
            )
        return kept

    def judged(self, scores: Scores) -> Scores:
        """Scores whose headline is the lower the better.

        Of an estimate, that is how far it is from the one of real data; it is put in front.
        """
        if not self.evaluation.judge.estimate:
            return scores
        metric = self.evaluation.judge.metric
        nearness = [abs(value - self._floor) for value in scores[metric]]
        return {f"|{metric} - real data's|": nearness} | scores

    @cached_property
    def _floor(self) -> float:
        """The headline of as many real items of the other split as samples are drawn."""
        data, device = self.data, default_device()
        judge = self.evaluation.judge.to(device)
        reference = judge.reference(data.reference, data.real("reference"), device)
        fresh = judge.real(data.fresh(self.evaluation.samples), device)
        return judge.distances(fresh, reference.summary)[judge.metric]


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
