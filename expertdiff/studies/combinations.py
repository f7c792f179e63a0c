"""Which interval's expert helps, and which hurts (MDM, OpenReview cdIyf38mRw, table 4)."""

from pathlib import Path

from expertdiff.studies.trained import Trained, print_rows, told, write_rows


def combinations(study: Path, samples: int | None = None, seeds: list[int] | None = None) -> None:
    """Tell where experts help: each alone in the baseline, and each replaced by the baseline.

    Writes ``<study>/combinations.csv``. What the chains of two models share is sampled once.

    Args:
        study: its folder; it must have experts and a baseline.
        samples: of each model and sampling seed; by default as it was launched.
        seeds: of sampling, as ``[0,1,2]``; all models are drawn with the same.
    """
    trained = Trained.open(study, samples, seeds)
    jobs = trained.experts
    baseline = trained.folder / trained.baseline.name
    experts = [trained.folder / job.name for job in jobs]
    mixes = {"baseline": [baseline] * len(jobs), "all experts": experts}
    for i, job in enumerate(jobs):
        mixes[f"only expert {i} {job.interval}"] = [
            path if e == i else baseline for e, path in enumerate(experts)
        ]
    for i, job in enumerate(jobs if len(jobs) > 2 else []):  # of two, these are the same again
        mixes[f"all but expert {i} {job.interval}"] = [
            baseline if e == i else path for e, path in enumerate(experts)
        ]
    scores = trained.mixer().score(mixes)
    rows = [{"model": name} | told(trained.judged(scores[name])) for name in mixes]
    metric = list(rows[0])[1]
    for row in rows:
        row["against baseline"] = f"{100 * (row[metric] / rows[0][metric] - 1):+.1f} %"
    path = trained.folder / "combinations.csv"
    write_rows(rows, path)
    print_rows(rows, ["model", metric, f"{metric} std", "against baseline"])
    print(f"table: {path}")
