"""What training has cost, and when it had paid: studies side by side (MDM, tables 2 and 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
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
    costs,
)
from expertdiff.files import replacing
from expertdiff.look import style
from expertdiff.report.study import Job
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

    The first study's baseline is what all are compared with; others may have one model of the whole
    chain instead of experts, as Remix. Experts are taken as they stand when all train at once, each
    on its own device, and stop at their budgets. Needs studies launched with
    ``--checkpoint.keep null``.

    Args:
        studies: their folders; all are judged as the first.
        samples: of each model and sampling seed; by default as the first was launched.
        seeds: of sampling, as ``[0,1,2]``.
        rule: when a curve counts as converged, in units of the metric.
        measure: cost in ``iterations``, which know no devices, or in measured ``seconds``.
        output: folder of ``table.csv``, ``milestones.csv`` and ``figure.png``; by default
            ``<first study>/compare``.
    """
    first = Trained.open(studies[0], samples, seeds)
    others = [Trained.open(folder).judged_as(first) for folder in studies[1:]]
    names = names_of(studies)
    baseline = first.baseline
    curves = [whole_curve(first, baseline, names[0])]
    for trained, name in zip((first, *others), names):
        if trained.study.experts:
            curves.append(experts_curve(trained, name))
        jobs = [job for job in trained.study.whole if job is not baseline]
        curves += [whole_curve(trained, job, name) for job in jobs]
    reference = curves[0].history
    rows = [row for curve in curves for row in curve.rows(reference, measure)]
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
    stds = [a.seed_std for a in accounts.values() if a.seed_std is not None]
    if stds:
        print(
            f"between sampling seeds {metric} has a standard deviation of up to {max(stds):.3g}; "
            f"converged means changes below {rule.change:g}"
        )
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

    def rows(self, reference: History, measure: Measure) -> list[dict[str, Any]]:
        """A row a point; the end of `reference` costs 100 %."""
        spent = costs(self.history, reference, measure).tolist()
        shared = self.history.shared.get("iterations", 0)
        return [
            {"model": self.name, "iterations": sum(point.iterations) + shared}
            | {"NTC": ntc, "NWCT": nwct}
            | columns
            for point, (ntc, nwct), columns in zip(self.history.points, spent, self.columns)
        ]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart.

    Raises:
        ValueError: a folder is named twice.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(
            f"the studies {', '.join(map(str, folders))} are not all different: name each once"
        )
    n = next(n for n in count(1) if len({part[-n:] for part in parts}) == len(parts))
    return [str(Path(*part[-n:])) for part in parts]


def whole_curve(trained: Trained, job: Job, name: str) -> Curve:
    """A job that trains a model of the whole chain, as a baseline or Remix, at each checkpoint."""
    n = len(trained.study.partition)
    kept = trained.kept(job)
    mixes = {step: [path] * n for step, path in kept.items()}
    spent = {step: {job.name: step} for step in kept}
    return _curve(trained, f"{name} {job.name}", mixes, spent)


def experts_curve(trained: Trained, name: str) -> Curve:
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
    return _curve(trained, f"{name} experts", mixes, spent, trained.study.shared)


def _curve(
    trained: Trained,
    name: str,
    mixes: dict[int, list[Path]],
    spent: dict[int, dict[str, int]],
    before: Job | None = None,
) -> Curve:
    mixer = trained.mixer()
    # Each is kept when it is done.
    scores = [trained.judged(mixer.score({"": mix})[""]) for mix in mixes.values()]
    metric, jobs = next(iter(scores[0])), trained.study.jobs
    points = []
    for steps, score in zip(spent.values(), scores):
        seconds = [jobs[name].seconds(step) for name, step in steps.items()]
        known = None if None in seconds else seconds
        points.append(Point(list(steps.values()), score[metric], known))
    devices = max(jobs[name].devices for name in next(iter(spent.values())))
    shared = before and {"iterations": before.step, "seconds": before.seconds(before.step)}
    history = History(points, devices, shared or {})
    return Curve(name, metric, history, [told(score) for score in scores])


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
    if estimate.value is None and not estimate.found:
        return None
    text = "-" if estimate.value is None else f"{estimate.value:.3g}"
    if estimate.low is not None:
        text += f" ({estimate.low:.3g} to {estimate.high:.3g})"
    if estimate.found is not None and estimate.found < 1:
        text += f", found in {100 * estimate.found:.3g} %"
    return text


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
