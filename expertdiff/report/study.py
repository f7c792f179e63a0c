"""A study folder, finished or not, as plain objects."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from expertdiff.describe import build
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.files import read_json
from expertdiff.metrics import read_metrics

BASELINE, STITCHED, SHARED = "baseline", "stitched", "shared"
"""The names of the tests that the verdict compares, the first that of a job too; and of the job
that experts start from."""


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        name: its folder in the study.
        interval: what it trains.
        iterations: how many it shall train.
        history: the lines of its metrics file.
        done: its record of completion, ``None`` while unfinished.
        mixing: the newest picture of what its experts are mixed of, if they are.
    """

    name: str
    interval: Interval
    iterations: int
    history: list[dict[str, Any]]
    done: dict[str, Any] | None
    mixing: Path | None = None

    @property
    def step(self) -> int:
        """The last step known."""
        if self.done:
            return self.done["step"]
        return max((line["step"] for line in self.history), default=0)

    @property
    def devices(self) -> int:
        """How many devices it trained on."""
        return (self.done or {}).get("devices", 1)

    def seconds(self, step: int) -> float | None:
        """Wall-clock seconds of training (not validation) to `step`; ``None`` if none is logged."""
        if self.done and step >= self.done["step"]:
            return self.done["seconds"]
        return max(
            (
                line["seconds"]
                for line in self.history
                if "seconds" in line and line["step"] <= step
            ),
            default=None,
        )

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """The steps and values of `key`; only positive ones, which is what a log axis can show."""
        points = [
            (line["step"], line[key]) for line in self.history if 0 < line.get(key, 0) < math.inf
        ]
        steps, values = zip(*points) if points else ((), ())
        return list(steps), list(values)


@dataclass(frozen=True)
class Result:
    """The test of one bundle: its folder's name and metrics; if any, its sample grid and losses.

    These are of each expert on each interval, as `expert_losses` tells them.
    """

    name: str
    metrics: dict[str, Any]
    grid: Path | None
    losses: dict[str, Any] | None = None

    @property
    def steps(self) -> dict[str, int]:
        """The trained steps of each expert of the bundle."""
        return self.metrics["steps"]


@dataclass(frozen=True)
class Study:
    """Everything a report tells about.

    Attributes:
        facts: the study's own description.
        jobs: baseline first, then the experts, cleanest first.
        results: baseline and stitched first, then the others by name.
    """

    facts: dict[str, Any]
    jobs: dict[str, Job]
    results: dict[str, Result]

    @cached_property
    def partition(self) -> Partition:
        """The intervals."""
        return Partition(self.facts["partition"])

    @cached_property
    def process(self) -> NoiseProcess:
        """The noise process of all jobs."""
        return build(self.facts["process"], NoiseProcess)

    @property
    def experts(self) -> list[Job]:
        """The jobs that train a part of the chain, cleanest first."""
        return [job for job in self.jobs.values() if job.name.startswith("expert-")]

    @property
    def shared(self) -> Job | None:
        """The job that the experts start from, if there is one."""
        return self.jobs.get(SHARED)

    @property
    def whole(self) -> list[Job]:
        """The jobs that each make a model of the whole chain, the baseline first."""
        parts = [*self.experts, self.shared]
        return [job for job in self.jobs.values() if job not in parts]

    @property
    def expected(self) -> list[str]:
        """The names of the tests that a finished study has."""
        return [job.name for job in self.whole] + [STITCHED] * bool(self.experts)


def read_study(folder: Path) -> Study:
    """What is there so far.

    Raises:
        ValueError: `folder` holds no study, or one of its files is no valid JSON.
    """
    if not (folder / "study.json").is_file():
        raise ValueError(f"{folder} holds no study.json: give the folder of a study")
    facts = read_json(folder / "study.json")
    jobs = [_job(folder / name, planned) for name, planned in facts["jobs"].items()]
    jobs.sort(key=lambda job: (job.name != BASELINE, job.interval.lo))
    results = [_result(path.parent) for path in folder.glob("tests/*/metrics.json")]
    results.sort(key=lambda result: (result.name not in (BASELINE, STITCHED), result.name))
    return Study(facts, {job.name: job for job in jobs}, {r.name: r for r in results})


def _job(folder: Path, planned: dict[str, Any]) -> Job:
    record = folder / "done.json"
    done = read_json(record) if record.is_file() else None
    return Job(
        name=folder.name,
        interval=Interval(*planned["interval"]),
        iterations=planned["iterations"],
        history=read_metrics(folder / "metrics.jsonl"),
        # That of fewer steps is of a round, or of a training that goes on.
        done=done if done and done["step"] >= planned["iterations"] else None,
        mixing=max(folder.glob("mixing/step-*.png"), default=None),
    )


def _result(folder: Path) -> Result:
    grid, losses = folder / "grid.png", folder / "losses.json"
    return Result(
        name=folder.name,
        metrics=read_json(folder / "metrics.json"),
        grid=grid if grid.is_file() else None,
        losses=read_json(losses) if losses.is_file() else None,
    )
