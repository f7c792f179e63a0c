"""When each expert of a study has converged (MDM, OpenReview cdIyf38mRw, figure 3)."""

from pathlib import Path

from matplotlib.figure import Figure

from expertdiff.analysis.cost import Rule, best, converged
from expertdiff.files import replacing
from expertdiff.look import style
from expertdiff.report.figures import interval_colours
from expertdiff.studies.trained import Trained, print_rows, told, write_rows


def convergence(
    study: Path,
    samples: int | None = None,
    seeds: list[int] | None = None,
    rule: Rule = Rule(),  # noqa: B008
) -> None:
    """Tell when each expert converges: the distance with each of its checkpoints, others finished.

    Needs a study launched with ``--checkpoint.keep null``. Writes ``<study>/convergence/table.csv``
    and ``figure.png``. Scores are kept: run it again to continue.

    Args:
        study: its folder.
        samples: of each model and sampling seed; by default as it was launched.
        seeds: of sampling, as ``[0,1,2]``; all points are drawn with the same.
        rule: when a curve counts as converged, in units of the metric.
    """
    trained = Trained.open(study, samples, seeds)
    mixer, experts = trained.mixer(), trained.experts
    finished = [trained.folder / expert.name for expert in experts]
    rows, curves = [], []
    for i, expert in enumerate(experts):
        kept = trained.kept(expert)
        mixes = {
            str(step): [*finished[:i], path, *finished[i + 1 :]] for step, path in kept.items()
        }
        scores = mixer.score(mixes)  # one expert at a time: what is done stays done
        columns = [told(trained.judged(scores[str(step)])) for step in kept]
        metric = next(iter(columns[0]))
        values = [row[metric] for row in columns]
        milestones = {"converged": converged(values, rule), "best": best(values)}
        for n, (step, row) in enumerate(zip(kept, columns)):
            lead = {"expert": i, "interval": str(expert.interval), "step": step}
            here = ", ".join(name for name, point in milestones.items() if point == n)
            rows.append(lead | row | {"milestone": here or None})
        curves.append((list(kept), values, [row[f"{metric} std"] for row in columns]))
    folder = trained.folder / "convergence"
    write_rows(rows, folder / "table.csv")
    figure = convergence_figure([str(e.interval) for e in experts], curves, metric)
    with style(), replacing(folder / "figure.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print_rows(rows, ["expert", "interval", "step", metric, f"{metric} std", "milestone"])
    print(f"table: {folder / 'table.csv'}\nfigure: {folder / 'figure.png'}")


def convergence_figure(
    names: list[str], curves: list[tuple[list[int], list[float], list[float | None]]], metric: str
) -> Figure:
    """A curve an expert: the distance over its own iterations, with the seeds' deviation.

    Args:
        names: of the experts.
        curves: steps, distances, and their deviations where there are several seeds.
        metric: the name of the distance.
    """
    with style():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, (steps, values, stds), colour in zip(names, curves, interval_colours(len(names))):
            errors = None if None in stds else stds
            axes.errorbar(steps, values, errors, color=colour, label=name, marker=".", capsize=2)
        axes.set(xlabel="iterations of this expert, all others finished", ylabel=metric)
        axes.legend(title="expert of")
    return figure
