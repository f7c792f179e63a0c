"""The sections of the page, each a function of the study."""

import re
from typing import Any

from PIL import Image

from expertdiff.analysis.losses import best_at_home, losses_figure
from expertdiff.diffusion.process import DiscreteVP
from expertdiff.report import verdict
from expertdiff.report.figures import (
    BASELINE_COLOUR,
    EXPERT_COLOUR,
    chain_figure,
    loss_figure,
    ratio_figure,
    similarity_figure,
    svg,
)
from expertdiff.report.markup import Markup, joined, picture, section, table, tag
from expertdiff.report.study import BASELINE, STITCHED, Job, Result, Study
from expertdiff.report.verdict import DEVIATIONS, cost, spread, state

COLOURS = {BASELINE: BASELINE_COLOUR, STITCHED: EXPERT_COLOUR}
GRID_WIDTH = 558
"""CSS pixels of a sample grid: two side by side."""

OUTCOMES = ("name", "values", "mean", "std", "floor", "further", "further_floors")
"""What a test found, as opposed to how."""

SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def missing(study: Study) -> Markup:
    lines = verdict.missing(study)
    if not lines:
        return Markup()
    title = tag("p", "This study is not finished. Missing:")
    return tag("div", title, tag("ul", *(tag("li", line) for line in lines)), class_="missing")


def chain(study: Study) -> Markup:
    complete = len(study.experts) == len(study.partition)
    iterations = [job.iterations for job in study.experts] if complete else None
    # Not the baseline's calls: it has one network, which does not tell the intervals apart.
    calls = study.results[STITCHED].metrics["calls"] if STITCHED in study.results else None
    figure = chain_figure(study.partition, study.process, iterations, calls)
    return section(
        "The chain and its experts",
        tag("figure", Markup(svg(figure)), role="img", aria_label="noise schedule and intervals"),
        note="Each expert denoises the part of the chain above its column and is trained on that "
        "part alone. x_t = alpha x0 + sigma eps, SNR = alpha^2/sigma^2; sampling runs from right "
        "to left.",
    )


def distances(study: Study) -> Markup:
    rows = [row for result in study.results.values() for row in _distances(result)]
    if not rows:
        return section("Distance to the data", tag("p", "Nothing has been tested yet."))
    measured = next(iter(study.results.values()))
    rows += _floors(measured)
    header = ["method", "metric", "distance", "by sampling seed", "samples", "nfe"]
    return section(
        "Distance to the data",
        table([*header, "reference", "extractor"], rows),
        note="Lower is better, but of IS, precision and recall higher is; of an estimate of KL, "
        "nearer to the number of real data is. Mean ± "
        "standard deviation over the sampling seeds. The spread says nothing about other training "
        "seeds. All distances depend on the number of samples: compare rows of this table only. "
        "The verdict calls a difference real when it exceeds "
        f"{DEVIATIONS} standard deviations of the difference of two single-seed measurements. Real "
        "data of another split, measured against the same reference, show how low a distance can "
        "be.",
    )


def _distances(result: Result) -> list[list[str]]:
    facts = result.metrics
    further = facts.get("further", {})
    return [
        [
            _method(result.name),
            metric,
            spread(values),
            ", ".join(f"{value:.4g}" for value in values["values"]),
            f"{facts['samples']:,}",
            str(facts["nfe"]),
            *_measure(result),
        ]
        for metric, values in ({facts["metric"]: facts} | further).items()
    ]


def _floors(result: Result) -> list[list[str]]:
    facts = result.metrics
    if facts["floor"] is None:
        return []
    floors = {facts["metric"]: facts["floor"]} | facts.get("further_floors", {})
    count = _plain(facts.get("floor_samples"))
    return [
        ["real data of another split", metric, f"{floor:.4g}", "–", count, "–", *_measure(result)]
        for metric, floor in floors.items()
    ]


def _measure(result: Result) -> list[str]:
    facts = result.metrics
    return [
        f"{facts['reference']}, {_plain(facts['reference_samples'])} items",
        _plain(facts["extractor"]),
    ]


def costs(study: Study) -> Markup:
    costs = {name: cost(study, result) for name, result in study.results.items()}
    if not costs:
        return Markup()
    base = costs.get(BASELINE)
    rows = [
        [
            _method(name),
            f"{c.total:,}",
            f"{c.longest:,}",
            f"{c.ntc:.1f}",
            f"{c.nwct:.1f}",
            _duration(c.wall, base and base.wall),
            _duration(c.device, base and base.device),
        ]
        for name, c in costs.items()
    ]
    header = ["method", "total iterations", "longest job", "NTC", "NWCT"]
    return section(
        "Training cost",
        table([*header, "wall clock of the slowest job", "device time of all jobs"], rows),
        note="NTC = 100 sum(I_e)/I_base and NWCT = 100 max(I_e)/I_base with the iterations I_e of "
        f"each job and I_base = {study.facts['iterations']:,}: total and wall-clock training cost "
        "in per cent of the baseline's budget, one device an expert and an iteration equally dear "
        "everywhere (MDM). The last two columns are measured, without validation; in brackets, per "
        "cent of the baseline's.",
    )


def losses(study: Study) -> Markup:
    figures = {
        "squared error": loss_figure(study, "mse", "validation mse"),
        "squared error of expert over baseline": ratio_figure(study),
        "variational bound of the learned variance": loss_figure(
            study, "vb", "validation vb (bits)"
        ),
    }
    drawn = [
        tag("figure", Markup(svg(figure)), role="img", aria_label=f"validation {name} by interval")
        for name, figure in figures.items()
        if figure
    ]
    if not drawn:
        return section("Losses by interval", tag("p", "No validation loss has been logged yet."))
    return section(
        "Losses by interval",
        *drawn,
        note="Of the averaged weights, on the same images, t and noise for baseline and expert, so "
        "that the two curves of a panel may be compared. Losses of different intervals may not: "
        "how hard the target is to predict changes along the chain, whatever the network. A step "
        "of the baseline trains the whole chain, a step of an expert its own interval. Below 1 the "
        "expert is better after as many steps; lines are means of five neighbouring points, bands "
        "their range. All axes are logarithmic.",
    )


def experts(study: Study) -> Markup:
    """Each expert on each interval."""
    found = {result.name: result.losses for result in study.results.values() if result.losses}
    if not found:
        return Markup()
    figures = [
        tag(
            "figure",
            tag("figcaption", _method(name), f": on {best_at_home(record)} of "
                f"{len(record['mse'])} intervals nobody is better than the owner"),
            Markup(svg(losses_figure(record))),
            role="img",
            aria_label=f"loss of the experts of {name} on each other's intervals",
        )
        for name, record in found.items()
    ]  # fmt: skip
    items = ", ".join(dict.fromkeys(f"{record['items']:,}" for record in found.values()))
    return section(
        "Loss by expert",
        *figures,
        note="A row an expert, a column an interval: how much larger the squared error of this "
        f"expert is there than that of the owner, in per cent, on the same {items} validation "
        "items, t and noise. Blue is better than the owner, red is worse.",
    )


def mixing(study: Study) -> Markup:
    """What mixed experts are mixed of, and how far the bases are apart."""
    pictures = [job.mixing for job in study.jobs.values() if job.mixing]
    similarity = similarity_figure(study)
    if not pictures and not similarity:
        return Markup()
    figures = [
        tag("figure", picture(path, "coefficients of each expert", class_="smooth"))
        for path in pictures
    ]
    if similarity:
        drawn = Markup(svg(similarity))
        label = "distance and cosine of the bases over training"
        figures.append(tag("figure", drawn, role="img", aria_label=label))
    return section(
        "What the experts are mixed of",
        *figures,
        note="Coefficients of the averaged weights after the last validation, a row an expert. "
        "Distances of two bases are those of all their mixed weights over the root of the product "
        "of their lengths; means over all pairs. Bases that start from one network have distance "
        "0 and cosine 1.",
    )


def grids(study: Study) -> Markup:
    grids = {name: result.grid for name, result in study.results.items() if result.grid}
    if not grids:
        return section("Samples", tag("p", "No samples have been drawn yet."))
    sizes = {}
    for name, path in grids.items():
        with Image.open(path) as image:
            sizes[name] = image.width
    zoom = max(1, GRID_WIDTH // max(sizes.values()))
    shown = {name: str(min(GRID_WIDTH, zoom * size)) for name, size in sizes.items()}
    figures = [
        tag(
            "figure",
            tag("figcaption", _method(name)),
            picture(path, name, width=shown[name]),
        )
        for name, path in grids.items()
    ]
    return section(
        "Samples",
        tag("div", *figures, class_="grids"),
        note=("" if zoom == 1 else f"Enlarged {zoom} times on a screen, unsmoothed. ")
        + "The first samples of the first "
        "seed: with equal seeds, the same place in two grids started from the same noise.",
    )


def measurements(study: Study) -> Markup:
    results = list(study.results.values())
    # Whatever a test wrote down, so that nothing it depends on can be left out here.
    keys = dict.fromkeys(key for r in results for key in r.metrics if key not in OUTCOMES)
    rows = [[key.replace("_", " "), *(_plain(r.metrics.get(key)) for r in results)] for key in keys]
    tests = [table(["test", *(_method(r.name) for r in results)], rows)] if results else []
    about = ("process", "partition", "data", "iterations", "seed")
    facts = [[key, _plain(study.facts[key])] for key in about]
    return section("How every number was made", *tests, table(["study", ""], facts))


def jobs(study: Study) -> Markup:
    header = ["job", "interval", "t", "iterations", "state", "wall clock", "steps/s", "device"]
    rows = [_job(study, job) for job in study.jobs.values()]
    files = [
        "<job>/job.yaml: its configuration; `expertdiff fit --config <job>/job.yaml` trains or "
        "resumes it",
        "<job>/metrics.jsonl: every number it logged",
        "<job>/done.json: step, time, device and checksum of its weights once it has finished",
        "tests/<bundle>/job.yaml: as above; `expertdiff test --config tests/<bundle>/job.yaml`",
        "tests/<bundle>/metrics.json, grid.png: distances and samples of a bundle",
    ]
    return section(
        "Jobs and files",
        table([*header, "weights (SHA-256)"], rows),
        tag("ul", *(tag("li", line) for line in files)),
    )


def _job(study: Study, job: Job) -> list[str]:
    done, seconds = job.done or {}, job.seconds(job.step)
    t = job.interval.steps(study.process.T) if isinstance(study.process, DiscreteVP) else None
    return [
        job.name,
        str(job.interval),
        f"{t[0]}–{t[-1]}" if t else "–",
        f"{job.iterations:,}",
        state(job),
        _duration(seconds),
        f"{job.step / seconds:.3g}" if seconds else "–",
        done.get("device", "–"),
        _plain(done.get("sha256")),
    ]


def _method(name: str) -> Markup:
    """The name with its colour in the curves, if it has one."""
    if name not in COLOURS:
        return joined([name])
    return joined([tag("i", style=f"background:{COLOURS[name]}"), name])


def _duration(seconds: float | None, base: float | None = None) -> str:
    if seconds is None:
        return "–"
    minutes, hours = seconds / 60, seconds / 3600
    text = f"{seconds:.3g} s" if minutes < 2 else f"{minutes:.3g} min"
    text = text if hours < 2 else f"{hours:.3g} h"
    return f"{text} ({100 * seconds / base:.0f} %)" if base else text


def _plain(value: Any) -> str:
    """A value of a study or test for reading: ``DDIM(steps=ddim50, eta=0)``, checksums short."""
    if isinstance(value, dict) and value.keys() == {"class_path", "init_args"}:
        arguments = [f"{key}={_plain(item)}" for key, item in value["init_args"].items()]
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(arguments)})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else SHA256.sub(r"\1…", str(value))
