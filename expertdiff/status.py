"""How a study goes, at once: from its files and the queue, without torch or Lightning."""

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from expertdiff.cluster import Queued, queue
from expertdiff.files import read_json
from expertdiff.metrics import Progress

FAILED = re.compile(r"(?:expertdiff: error: |^(?=[\w.]+(?:Error|Exception)\b))(.*)")
"""The last line of a job that ended so: refused in a sentence, or with a traceback."""


def status(args: Sequence[str]) -> None:
    """Tell how the jobs of a study go: queued, running or done, steps, speed, loss, time left."""
    parser = argparse.ArgumentParser(prog="expertdiff status", description=status.__doc__)
    parser.add_argument("study", type=Path, help="the study's folder")
    folder = parser.parse_args(args).study
    if not (folder / "study.json").is_file():
        raise ValueError(f"{folder} holds no study.json: give the folder of a study")
    waiting = []
    try:
        waiting = queue(folder) or []
    except ValueError as error:
        print(f"the queue is not known: {error}\n")
    rows = rows_of(folder, waiting)
    table = [["job", "state", "step", "it/s", "loss", "left"], *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    for row in rows:
        if row.error:
            print(f"{row.name} failed: {row.error}")
    evaluation = [job for job in waiting if job.index is None]
    report = folder / "report.html"
    if evaluation:
        print(f"evaluation: {_told(evaluation[0])}")
    elif report.is_file():
        print(f"report: {report}")


@dataclass(frozen=True)
class Row:
    """A training job.

    Attributes:
        name: its folder in the study.
        state: in words.
        steps: that it shall train.
        progress: where it is.
        going: whether it trains now, so that its speed says how long it will take.
        error: why it failed.
    """

    name: str
    state: str
    steps: int
    progress: Progress
    going: bool
    error: str = ""

    def cells(self) -> list[str]:
        """For a table."""
        at, speed, loss = self.progress.step, self.progress.speed, self.progress.loss
        left = ""
        if self.going and speed:
            left = str(timedelta(seconds=round((self.steps - at) / speed)))
        numbers = [
            "" if n is None else form.format(n) for n, form in ((speed, "{:.1f}"), (loss, "{:.4f}"))
        ]
        return [self.name, self.state, f"{at:,} of {self.steps:,}", *numbers, left]


def rows_of(folder: Path, waiting: Sequence[Queued]) -> list[Row]:
    """One a training job, in the order of ``study.json``."""
    tasks = [job for job in waiting if job.index is not None]
    names = (folder / "jobs.txt").read_text(encoding="utf-8").split() if tasks else []
    queued = {names[job.index]: job for job in tasks}
    jobs = read_json(folder / "study.json")["jobs"]
    return [_row(folder / name, job["iterations"], queued.get(name)) for name, job in jobs.items()]


def _row(job: Path, steps: int, queued: Queued | None) -> Row:
    progress = Progress.of(job)
    done = job / "done.json"
    trained = read_json(done)["step"] if done.is_file() else 0
    if trained >= steps:
        return Row(job.name, "done", steps, Progress(trained, progress.loss, progress.speed), False)
    if queued:
        return Row(job.name, _told(queued), steps, progress, queued.state == "running")
    if error := FAILED.search(_last_line(job / "log.txt")):
        return Row(job.name, "failed", steps, progress, False, error[1])
    metrics = job / "metrics.jsonl"
    if not metrics.is_file():
        return Row(job.name, "not started", steps, progress, False)
    age = timedelta(seconds=round(time.time() - metrics.stat().st_mtime))
    return Row(job.name, f"last heard of {age} ago", steps, progress, True)


def _told(job: Queued) -> str:
    return f"{job.state} {job.id}" + (f" ({job.reason})" if job.state == "pending" else "")


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")
