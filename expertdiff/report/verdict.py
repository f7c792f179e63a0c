"""What the numbers of a study say, in words, and what they cost."""

import math
from dataclasses import dataclass
from typing import Any

from expertdiff.describe import differences
from expertdiff.report.study import BASELINE, STITCHED, Job, Result, Study

MEASURED_ALIKE = (
    "metric",
    "sampler",
    "guidance",
    "seeds",
    "samples",
    "reference",
    "reference_samples",
    "extractor",
    "ema_decay",
    "precision",
    "data",
)
"""What two tests must share before their distances may be compared."""

DEVIATIONS = 2
"""Standard deviations of a difference below which it may come from the sampling seeds alone."""


@dataclass(frozen=True)
class Cost:
    """The training cost of a bundle.

    Attributes:
        total, longest: iterations, of all its jobs and of the longest.
        ntc, nwct: both in per cent of the baseline's budget (MDM, section 4).
        wall, device: seconds, of the slowest job and summed over devices; ``None`` if not logged.
    """

    total: int
    longest: int
    ntc: float
    nwct: float
    wall: float | None
    device: float | None


def cost(study: Study, result: Result) -> Cost:
    """What training the experts of a tested bundle took; every job has its own device."""
    steps = result.steps
    total, longest, budget = sum(steps.values()), max(steps.values()), study.facts["iterations"]
    wall = device = None
    if steps.keys() <= study.jobs.keys():
        jobs = [study.jobs[name] for name in steps]
        seconds = [job.seconds(steps[job.name]) for job in jobs]
        if None not in seconds:
            wall = max(seconds)
            device = sum(s * job.devices for s, job in zip(seconds, jobs))
    first = study.shared
    if first and any(name.startswith("expert-") for name in steps):  # spent once, at the start
        total, longest = total + first.iterations, longest + first.iterations
        seconds = first.seconds(first.iterations)
        if wall is not None:
            wall = None if seconds is None else wall + seconds
            device = None if seconds is None else device + seconds * first.devices
    return Cost(total, longest, 100 * total / budget, 100 * longest / budget, wall, device)


def verdict(study: Study) -> str:
    """One sentence: who is better, by how much, and whether the sampling seeds allow to say so."""
    experts, baseline = study.results.get(STITCHED), study.results.get(BASELINE)
    if experts is None and baseline is None:
        alone = "; ".join(f"{r.name}: {_tested(r)}" for r in study.results.values())
        return (
            f"{alone}. One model, nothing to compare it with."
            if alone
            else ("No verdict yet: nothing has been tested.")
        )
    if experts is None:
        return f"No verdict yet: the stitched experts are not tested; baseline {_tested(baseline)}."
    if baseline is None:
        planned = BASELINE in study.jobs
        why = (
            "No verdict yet: the baseline is not tested" if planned else "No baseline in this study"
        )
        return f"{why}; stitched experts {_tested(experts)}."
    ours, theirs = (
        {key: r.metrics.get(key) for key in MEASURED_ALIKE} for r in (experts, baseline)
    )
    if unlike := differences(ours, theirs):
        return (
            "No verdict: stitched experts and baseline were not measured alike "
            f"({'; '.join(unlike)})."
        )
    return (
        f"Stitched experts: {experts.metrics['metric']} {spread(experts.metrics)}, "
        f"baseline {spread(baseline.metrics)} {_budgets(study, experts, baseline)} "
        f"({_counts(experts)}): "
        f"{_winner(experts, baseline)}."
    )


def _winner(experts: Result, baseline: Result) -> str:
    ours, theirs = experts.metrics, baseline.metrics
    gain = _badness(baseline) - _badness(experts)
    size = f"{100 * abs(gain) / theirs['mean']:.2g} %"
    word = "better"
    if ours.get("nearest_to_floor"):
        size, word = f"{abs(gain):.2g}", f"nearer to real data ({ours['floor']:.2g})"
    better = f"{'the experts are' if gain > 0 else 'the baseline is'} {word} by {size}"
    if len(ours["values"]) < 2:
        return f"{better} with this one seed, which cannot tell a difference from chance"
    noise = DEVIATIONS * math.hypot(ours["std"], theirs["std"])
    numbers = f"(difference {abs(gain):.2g}, {DEVIATIONS} standard deviations {noise:.2g})"
    if abs(gain) <= noise:
        return f"the difference of {size} is within the sampling spread {numbers}, no winner"
    return f"{better}, more than the sampling spread {numbers}"


def _badness(result: Result) -> float:
    """The distance, or how far it is from that of real data, where an estimate may be too low."""
    facts = result.metrics
    return abs(facts["mean"] - facts["floor"]) if facts.get("nearest_to_floor") else facts["mean"]


def _budgets(study: Study, experts: Result, baseline: Result) -> str:
    ours, theirs = cost(study, experts).total, cost(study, baseline).total
    if ours == theirs:
        return "at equal total iterations"
    return f"with the experts at {100 * ours / theirs:.3g} % of the baseline's iterations"


def _tested(result: Result) -> str:
    return f"{result.metrics['metric']} {spread(result.metrics)} ({_counts(result)})"


def _counts(result: Result) -> str:
    seeds = len(result.metrics["values"])
    plural = "" if seeds == 1 else "s"
    return f"n = {result.metrics['samples']:,} samples, {seeds} sampling seed{plural}"


def spread(values: dict[str, Any]) -> str:
    """``1.230 ± 0.020`` of `values`, `mean` and `std`: two digits of the spread; none of one."""
    mean, std = values["mean"], values["std"]
    if len(values["values"]) < 2 or not std:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def missing(study: Study) -> list[str]:
    """What keeps this study from being finished, one line each."""
    lines = [f"{job.name}: {state(job)}" for job in study.jobs.values() if not job.done]
    lines += [f"the test of {name}" for name in study.expected if name not in study.results]
    for result in study.results.values():
        if result.grid is None:
            lines.append(f"the sample grid of {result.name}")
        if result.name not in study.expected:
            continue  # of a bundle that somebody made of whatever steps
        for name, step in result.steps.items():
            job = study.jobs.get(name)
            if job and step < job.iterations:
                lines.append(
                    f"a test of {result.name} with all of {name}: "
                    f"this one has step {step:,} of {job.iterations:,}"
                )
    return lines


def state(job: Job) -> str:
    """How far a job is."""
    if job.done:
        return "finished"
    if not job.step:
        return "not started"
    return f"unfinished, at step {job.step:,} of {job.iterations:,}"
