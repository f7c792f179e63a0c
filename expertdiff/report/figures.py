"""The pictures of a report, drawn without matplotlib's global state."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.lib.stride_tricks import sliding_window_view

from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import DiscreteVP, NoiseProcess
from expertdiff.look import INK, style
from expertdiff.report.study import BASELINE, Study

BASELINE_COLOUR, EXPERT_COLOUR = "#7f7f7f", "#d55e00"
"""Grey and vermillion: apart for every kind of colour vision, and none of an interval's colours."""

DISTANCE, COSINE = "mixing/basis_distance", "mixing/basis_cosine"
"""What `MixingMap` logs."""

WIDTH = 11
"""Inches: with text of 9 points, a page of 1100 pixels shows text of 12 pixels."""


def interval_colours(n: int) -> list[tuple[float, ...]]:
    """A colour an interval, dark (clean) to light (noisy), ordered for every colour vision."""
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.12, 0.92, n))]


def chain_figure(
    partition: Partition,
    process: NoiseProcess,
    iterations: Sequence[int] | None = None,
    calls: Sequence[int] | None = None,
) -> Figure:
    """A chain and its experts: the noise schedule, who owns which part, and what each part costs.

    Args:
        partition: the intervals.
        process: the noise process, drawn as log SNR, alpha and sigma over progress.
        iterations: of training, one an expert; ``None`` leaves the row out.
        calls: of the network while sampling one image, one an expert; ``None`` leaves the row out.

    Raises:
        ValueError: `iterations` or `calls` has not one number an expert.
    """
    rows = _rows(partition, process, {"iterations": iterations, "sampler calls": calls})
    with style():
        heights = [1.35, 1.35, 0.35 + 0.2 * len(rows)]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.9))
        figure.subplots_adjust(left=0.11, right=0.985, top=0.88, bottom=0.02, hspace=0.1)
        snr, coefficients, table = figure.subplots(3, gridspec_kw={"height_ratios": heights})
        _schedule(snr, coefficients, process)
        colours = interval_colours(len(partition))
        for axes in (snr, coefficients):
            axes.set_xlim(0, 1)
            axes.spines[:].set_visible(False)
            for interval, colour in zip(partition.intervals(), colours):
                axes.axvspan(interval.lo, interval.hi, color=colour, alpha=0.3, lw=0)
        _experts(table, partition, rows)
    return figure


def _rows(
    partition: Partition, process: NoiseProcess, counts: dict[str, Sequence[int] | None]
) -> dict[str, list[str]]:
    intervals = partition.intervals()
    rows = {
        "expert": [str(i) for i in range(len(intervals))],
        "progress": [f"{interval.lo:g}–{interval.hi:g}" for interval in intervals],
    }
    if isinstance(process, DiscreteVP):
        owned = [interval.steps(process.T) for interval in intervals]
        rows["timesteps t"] = [f"{t[0]}–{t[-1]}" if t else "none" for t in owned]
    for label, numbers in counts.items():
        if numbers is None:
            continue
        if len(numbers) != len(intervals):
            raise ValueError(f"{label} {list(numbers)}: give one number for each of {partition}")
        rows[label] = [f"{number:,}" for number in numbers]
    return rows


def _schedule(snr: Axes, coefficients: Axes, process: NoiseProcess) -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = process.times(u, Interval())
    progress = process.progress(t)
    alpha, sigma = process.alpha_sigma(t)
    snr.plot(progress, process.snr(t).log(), color=INK)
    snr.set_ylabel("log SNR")
    snr.xaxis.tick_top()
    snr.xaxis.set_label_position("top")
    snr.set_xlabel("progress of the chain")
    for x, label in ((0, "data"), (1, "noise")):
        snr.annotate(
            label, (x, 1), (0, 21), xycoords="axes fraction", textcoords="offset points",
            ha="left" if x == 0 else "right", weight="bold",
        )  # fmt: skip
    coefficients.plot(progress, alpha, color=INK, label="alpha")
    coefficients.plot(progress, sigma, color=INK, ls="--", label="sigma")
    coefficients.set_ylabel("coefficient")
    coefficients.set_xticks([])
    coefficients.legend(loc="center right")


def _experts(axes: Axes, partition: Partition, rows: dict[str, list[str]]) -> None:
    """Equal cells under the chain, so that the narrowest interval has room for its numbers."""
    n = len(partition)
    longest = max(len(text) for row in rows.values() for text in row)
    size = min(9, 72 * WIDTH * 0.875 / n / (0.66 * longest))
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.15, -1.6))
    axes.axis("off")
    for i, (interval, colour) in enumerate(zip(partition.intervals(), interval_colours(n))):
        lo, hi = (i + 0.03) / n, (i + 0.97) / n
        bottom = len(rows) + 0.15
        corners = [(interval.lo, -1.6), (interval.hi, -1.6), (hi, 0), (hi, bottom), (lo, bottom)]
        axes.add_patch(Polygon([*corners, (lo, 0)], color=colour, alpha=0.3, lw=0))
        for y, (label, texts) in enumerate(rows.items()):
            weight = "bold" if label == "expert" else "normal"
            centre = (i + 0.5) / n
            axes.text(centre, y + 0.5, texts[i], ha="center", va="center", size=size, weight=weight)
    for y, label in enumerate(rows):
        axes.text(-0.012, y + 0.5, label, ha="right", va="center")


def loss_figure(study: Study, loss: str, label: str) -> Figure | None:
    """Validation losses by interval, baseline against expert; ``None`` where none was logged.

    Args:
        study: whose jobs are drawn.
        loss: the key's middle part, ``mse`` or ``vb``.
        label: of the y axes.
    """
    n = len(study.partition)
    curves = [
        {
            job.name: job.curve(f"val/{loss}/{i}")
            for job in study.jobs.values()
            if job is not study.shared
        }
        for i in range(n)
    ]
    if not any(steps for panel in curves for steps, _ in panel.values()):
        return None
    columns = min(n, 4)
    lines = -(-n // columns)
    with style():
        figure = Figure(figsize=(WIDTH, 2.5 * lines + 0.35), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flat
        for i, (axes, panel) in enumerate(zip(panels, curves)):
            _loss_panel(axes, panel)
            axes.set_title(f"expert {i}: {study.partition.interval(i)}", loc="left")
            stripe = Rectangle((0, 0.985), 1, 0.03, transform=axes.transAxes, clip_on=False)
            stripe.set(color=interval_colours(n)[i], lw=0)
            axes.add_patch(stripe)
            if i % columns == 0:
                axes.set_ylabel(label)
            if i >= n - columns:
                axes.set_xlabel("steps of the job")
                axes.tick_params(labelbottom=True)
        for axes in figure.axes[n:]:
            axes.axis("off")
        # Last, because the panels share their steps.
        for axes in figure.axes[:n]:
            _few_ticks(axes)
        for name, colour in (("baseline", BASELINE_COLOUR), ("expert", EXPERT_COLOUR)):
            figure.axes[0].plot([], [], color=colour, label=name)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def _axes(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log")
    axes.spines["right"].set_visible(False)
    axes.grid(color=INK, alpha=0.12, lw=0.6)


def _loss_panel(axes: Axes, panel: dict[str, tuple[list[int], list[float]]]) -> None:
    _axes(axes)
    last = {}
    for name, (steps, values) in panel.items():
        if not steps:
            continue
        colour = BASELINE_COLOUR if name == BASELINE else EXPERT_COLOUR
        axes.plot(steps, values, color=colour, lw=1.6)
        axes.plot(steps[-1], values[-1], "o", color=colour, ms=4)
        last[name] = values[-1]
    if len(last) == 2 and BASELINE in last:
        ratio = [value for name, value in last.items() if name != BASELINE][0] / last[BASELINE]
        axes.text(0.98, 0.93, f"expert / baseline,\nlast values: {ratio:.3f}",
                  transform=axes.transAxes, ha="right", va="top")  # fmt: skip


def ratio_figure(study: Study) -> Figure | None:
    """Validation mse of each expert over the baseline's after as many of its own steps.

    Lines are means of five neighbouring points, bands their smallest and largest. ``None`` where no
    expert was validated at a step of the baseline's.
    """
    ratios = [_ratio(study, i) for i in range(len(study.partition))]
    if not any(map(len, ratios)):
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        _axes(axes)
        axes.axhline(1, color=BASELINE_COLOUR, lw=1)
        for i, (ratio, colour) in enumerate(zip(ratios, interval_colours(len(ratios)))):
            if len(ratio):
                near = sliding_window_view(ratio, min(5, len(ratio)), axis=0)
                steps, values = np.median(near[:, 0], axis=1), near[:, 1]
                label = f"expert {i}: {study.partition.interval(i)}"
                axes.plot(steps, values.mean(1), ".-", color=colour, label=label)
                axes.fill_between(
                    steps, values.min(1), values.max(1), color=colour, alpha=0.25, lw=0
                )
        axes.set(xlabel="steps of the expert, and of the baseline", ylabel="mse: expert / baseline")
        _few_ticks(axes)
        figure.legend(loc="outside upper left", ncols=4)
    return figure


def _ratio(study: Study, i: int) -> np.ndarray:
    """Steps and expert / baseline [P, 2] of interval i."""
    pair = [study.jobs.get(name) for name in (f"expert-{i}", BASELINE)]
    ours, theirs = (dict(zip(*job.curve(f"val/mse/{i}"))) if job else {} for job in pair)
    return np.array([(step, ours[step] / theirs[step]) for step in ours if step in theirs])


def similarity_figure(study: Study) -> Figure | None:
    """How far the bases of mixed experts are apart, over training; ``None`` where there are none.

    As `MixingMap` has logged it: the distance of two bases over the root of the product of their
    lengths, and their cosine, means over all pairs.
    """
    lines = [line for job in study.jobs.values() for line in job.history if DISTANCE in line]
    if not lines:
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), (DISTANCE, COSINE)):
            steps, values = zip(*((line["step"], line[key]) for line in lines))
            axes.plot(steps, values, ".-", color=EXPERT_COLOUR)
            axes.set(xlabel="steps of the job", ylabel=key.rpartition("_")[2] + " of two bases")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.spines["right"].set_visible(False)
            axes.grid(color=INK, alpha=0.12, lw=0.6)
    return figure


def _few_ticks(axes: Axes) -> None:
    """Four readable numbers a logarithmic axis, over decades as over a few per cent."""
    for axis in (axes.xaxis, axes.yaxis):
        lo, hi = axis.get_view_interval()
        digits = 1 if hi / lo > 10 else 2 if hi / lo > 1.3 else 3
        ticks = np.geomspace(lo * (hi / lo) ** 0.06, hi / (hi / lo) ** 0.06, 4)
        axis.set_major_locator(FixedLocator(sorted({float(f"{x:.{digits}g}") for x in ticks})))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:,.4g}" if x < 1e4 else f"{x:,.0f}")
        )


def svg(figure: Figure) -> str:
    """The figure as the ``<svg>`` of a page: in the page's text colour, without a background."""
    file = io.StringIO()
    with style():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
