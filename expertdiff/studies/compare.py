"""What training has cost, and when it had paid: studies side by side (MDM, tables 2 and 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expertdiff.analysis.cost import (
    Account,
    Estimate,
    History,
    Measure,
    Point,
    Rule,
    account,
    ntc,
    nwct,
)
from expertdiff.files import replacing
from expertdiff.look import style
from expertdiff.studies.trained import Trained, print_rows, told, write_rows


def compare(
    studies: list[Path],
    samples: int | None = None,
    seeds: list[int] | None = None,
    rule: Rule = Rule(),  # noqa: B008
    measure: Measure = "iterations",
    output: Path | None = None,
) -> None:
    """Tell what each study's models cost: distance against training cost, and their milestones.

    The first study's baseline is what all are compared with. Experts are taken as they stand when
    all train at once, each on its own device, and stop at their budgets. Needs studies launched
    with ``--checkpoint.keep null``.

    Args:
        studies: their folders; all are judged as the first.
        samples: of each model and sampling seed; by default as the first was launched.
        seeds: of sampling, as ``[0,1,2]``.
        rule: when a curve counts as converged, in units of the metric.
        measure: cost in ``iterations`` or in measured ``seconds``.
        output: folder of ``table.csv``, ``milestones.csv`` and ``figure.png``; by default
            ``<first study>/compare``.
    """
    first = Trained.open(studies[0], samples, seeds)
    others = [Trained.open(folder).judged_as(first) for folder in studies[1:]]
    curves = [baseline_curve(first)]
    for trained in (first, *others):
        if trained.study.experts:
            curves.append(experts_curve(trained))
        if trained is not first and "baseline" in trained.study.jobs:
            curves.append(baseline_curve(trained))
    reference = curves[0].history
    base = sum(reference.spent(measure)[-1])
    rows = [row for curve in curves for row in curve.rows(measure, base)]
    accounts = {c.name: account(reference, c.history, rule, measure) for c in curves}
    milestones = [row for name, a in accounts.items() for row in milestone_rows(name, a)]
    folder = Path(output or first.folder / "compare")
    write_rows(rows, folder / "table.csv")
    write_rows(milestones, folder / "milestones.csv")
    with style(), replacing(folder / "figure.png") as temporary:
        compare_figure(curves, rows).savefig(temporary, format="png", dpi=150)
    metric = curves[0].metric
    print_rows(rows, ["model", "NTC", "NWCT", metric, f"{metric} std"])
    print()
    print_rows(milestones, list(milestones[0]))
    print(f"tables: {folder / 'table.csv'}, milestones.csv\nfigure: {folder / 'figure.png'}")


@dataclass(frozen=True)
class Curve:
    """The distances of a model over its training.

    Attributes:
        name: of the model.
        metric: the headline distance.
        history: what it cost, and the distance by seed.
        columns: all distances of each point.
    """

    name: str
    metric: str
    history: History
    columns: list[dict[str, Any]]

    def rows(self, measure: Measure, base: float) -> list[dict[str, Any]]:
        """A row a point; `base` is the cost that counts as 100 %."""
        return [
            {"model": self.name, "iterations": sum(point.iterations)}
            | {"NTC": ntc(spent, base), "NWCT": nwct(spent, base)}
            | columns
            for point, spent, columns in zip(
                self.history.points, self.history.spent(measure), self.columns
            )
        ]


def baseline_curve(trained: Trained) -> Curve:
    """The study's baseline at each of its checkpoints."""
    job, n = trained.baseline, len(trained.study.partition)
    kept = trained.kept(job)
    mixes = {step: [path] * n for step, path in kept.items()}
    spent = {step: {job.name: step} for step in kept}
    return _curve(trained, f"{trained.folder.name} baseline", mixes, spent)


def experts_curve(trained: Trained) -> Curve:
    """The study's experts when each has trained for so many iterations, or to its end."""
    jobs = trained.study.experts
    kept = [trained.kept(job) for job in jobs]
    longest = max(kept, key=lambda steps: max(steps))
    mixes, spent = {}, {}
    for step in longest:
        at = [max((s for s in steps if s <= step), default=None) for steps in kept]
        if None not in at:
            mixes[step] = [steps[s] for steps, s in zip(kept, at)]
            spent[step] = {job.name: s for job, s in zip(jobs, at)}
    return _curve(trained, f"{trained.folder.name} experts", mixes, spent)


def _curve(
    trained: Trained, name: str, mixes: dict[int, list[Path]], spent: dict[int, dict[str, int]]
) -> Curve:
    mixer = trained.mixer()
    scores = [mixer.score({"": mix})[""] for mix in mixes.values()]  # each is kept when it is done
    metric, jobs = next(iter(scores[0])), trained.study.jobs
    points = []
    for steps, score in zip(spent.values(), scores):
        seconds = [jobs[name].seconds(step) for name, step in steps.items()]
        known = None if None in seconds else seconds
        points.append(Point(list(steps.values()), score[metric], known))
    devices = max(jobs[name].devices for name in next(iter(spent.values())))
    return Curve(name, metric, History(points, devices), [told(score) for score in scores])


def milestone_rows(name: str, found: Account) -> list[dict[str, Any]]:
    """A row a milestone: its cost, and against the baseline's best what it saves."""
    rows = []
    for milestone, at in found.model.items():
        row = {"model": name, "milestone": milestone, "NTC": _told(at.ntc), "NWCT": _told(at.nwct)}
        better = milestone == "equivalent"
        row["speed-up"] = _told(found.speed_up) if better else None
        row["saving"] = _told(found.saving) if better else None
        row["saving of time"] = _told(found.saving_wall) if better else None
        rows.append(row)
    return rows


def _told(estimate: Estimate) -> str | None:
    if estimate.value is None:
        return None
    spread = f" ({estimate.low:.3g} to {estimate.high:.3g})" if estimate.low is not None else ""
    return f"{estimate.value:.3g}{spread}"


def compare_figure(curves: list[Curve], rows: list[dict[str, Any]]) -> Figure:
    """Distance against total cost, and against the cost of the longest job."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, label in zip(panels, ("NTC", "NWCT"), ("all experts", "the longest expert")):
        _panel(axes, curves, rows, cost)
        axes.set(xlabel=f"{cost}: training of {label}, % of the baseline's")
    panels[0].set(ylabel=curves[0].metric)
    panels[1].legend()
    return figure


def _panel(axes: Axes, curves: list[Curve], rows: list[dict[str, Any]], cost: str) -> None:
    for curve in curves:
        mine = [row for row in rows if row["model"] == curve.name]
        stds = [row[f"{curve.metric} std"] for row in mine]
        x, y = ([row[key] for row in mine] for key in (cost, curve.metric))
        errors = None if None in stds else stds
        axes.errorbar(x, y, errors, label=curve.name, marker=".", capsize=2)
