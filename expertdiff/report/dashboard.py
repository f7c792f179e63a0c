"""The summary run of a study in W&B: what its report says, beside the runs of its jobs."""

import csv
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import instantiate_class

from expertdiff.loggers import WandB, log_picture
from expertdiff.report.study import Result, Study, read_study
from expertdiff.report.verdict import Cost, cost, verdict

Row = list[Any]


def dashboard(folder: Path, loggers: Any) -> None:
    """Logs the summary run of a study, and prints how to upload what W&B has kept offline.

    Args:
        folder: of the study, with its report.
        loggers: the trainer's, as a configuration has them; all but `WandB` are left alone.
    """
    named = loggers if isinstance(loggers, list) else [loggers]
    for logger in [instantiate_class((), entry) for entry in named if isinstance(entry, dict)]:
        if isinstance(logger, WandB):
            _summarize(folder, logger)
    if paths := _offline(folder):
        print(f"W&B kept runs offline; to upload them: wandb sync {' '.join(paths)}")


def _offline(folder: Path) -> list[str]:
    """What a shell expands to the runs of a study that were not uploaded yet."""
    jobs, tests = "*/wandb/offline-run-*", "tests/*/wandb/offline-run-*"
    return [
        f"{shlex.quote(str(folder))}/{pattern}"
        for pattern in (jobs, tests)
        if any(not list(run.glob("*.synced")) for run in folder.glob(pattern))
    ]


def _summarize(folder: Path, logger: WandB) -> None:
    import wandb  # slow to import

    study = read_study(folder)
    logger.attach(folder / "summary", study.facts["name"], "summary")
    logger.log_hyperparams(study.facts | {"verdict": verdict(study)})
    costs = {name: cost(study, result) for name, result in study.results.items()}
    for metrics, iterations in _compared(folder / "compare" / "table.csv"):
        logger.log_metrics(metrics, step=iterations)
    for name, result in study.results.items():
        step = costs[name].total
        logger.log_metrics(_figures(result, costs[name]), step=step)
        if result.grid:
            log_picture([logger], name, result.grid, step)
    for key, rows in {
        "distances": [row for result in study.results.values() for row in _distances(result)],
        "costs": [_cost(name, spent) for name, spent in costs.items()],
        "jobs": _jobs(study),
    }.items():
        logger.log_table(f"tables/{key}", COLUMNS[key], rows)
    page = (folder / "report.html").read_text(encoding="utf-8")
    logger.log_metrics({"report": wandb.Html(page, inject=False)})
    logger.finish()


COLUMNS = {
    "distances": ["model", "metric", "mean", "std", "real data", "seeds", "samples", "nfe"],
    "costs": ["model", "iterations", "longest job", "NTC", "NWCT", "seconds", "device seconds"],
    "jobs": ["job", "from", "to", "iterations", "steps", "seconds", "devices", "NTC"],
}
"""Of the tables; NTC and NWCT in per cent of the baseline's iterations, seconds of training."""


def _compared(path: Path) -> Iterator[tuple[dict[str, float], int]]:
    """The points of `expertdiff compare`, where it has been asked: distances and iterations."""
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                metric = list(row)[4]  # after the model and its cost
                yield (
                    {f"distance/{metric}/{row['model']}": float(row[metric])},
                    int(row["iterations"]),
                )


def _measured(result: Result) -> dict[str, tuple[dict[str, Any], float | None]]:
    """Of each metric the spread, and the distance of real data."""
    facts = result.metrics
    spreads = {facts["metric"]: facts} | facts.get("further", {})
    floors = {facts["metric"]: facts["floor"]} | facts.get("further_floors", {})
    return {metric: (values, floors.get(metric)) for metric, values in spreads.items()}


def _figures(result: Result, spent: Cost) -> dict[str, float]:
    name = result.name
    figures = {
        f"distance/{m}/{name}": values["mean"] for m, (values, _) in _measured(result).items()
    }
    costs = {"NTC": spent.ntc, "NWCT": spent.nwct, "seconds": spent.wall}
    figures |= {f"cost/{key}/{name}": value for key, value in costs.items() if value is not None}
    return figures


def _distances(result: Result) -> list[Row]:
    counts = [len(result.metrics["seeds"]), result.metrics["samples"], result.metrics["nfe"]]
    return [
        [result.name, metric, values["mean"], values["std"], floor, *counts]
        for metric, (values, floor) in _measured(result).items()
    ]


def _cost(name: str, spent: Cost) -> Row:
    return [name, spent.total, spent.longest, spent.ntc, spent.nwct, spent.wall, spent.device]


def _jobs(study: Study) -> list[Row]:
    budget = study.facts["iterations"]
    return [
        [job.name, job.interval.lo, job.interval.hi, job.iterations, job.step]
        + [job.seconds(job.step), job.devices, 100 * job.step / budget]
        for job in study.jobs.values()
    ]
