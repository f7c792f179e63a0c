"""Choosing intervals by one rule or by all, and the record and the picture of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expertdiff.analysis.intervals.attention import AttentionConcentration
from expertdiff.analysis.intervals.base import IntervalMethod, Selection
from expertdiff.analysis.intervals.gradients import GradientSimilarity
from expertdiff.analysis.intervals.optimal import OptimalDenoiser
from expertdiff.analysis.intervals.schedule import LogSNR, UniformLength
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import describe, differences
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.files import replacing, writable, write_json
from expertdiff.look import INK, style


def every() -> list[IntervalMethod]:
    """All methods, as they are by default."""
    return [
        UniformLength(),
        LogSNR(),
        OptimalDenoiser(),
        GradientSimilarity(),
        AttentionConcentration(),
    ]


def select(
    methods: Sequence[IntervalMethod],
    k: int,
    process: NoiseProcess,
    data: Data,
    bundle: Bundle | None,
    output: Path,
) -> list[Selection]:
    """Chooses `k` intervals by each method; writes what they chose, and prints it.

    ``intervals.json`` holds edges, settings, costs and curves by method, and ``edges`` beside them
    where there is one method; ``intervals.png`` shows them. Of several methods, one that does not
    apply is left out, and the record says why.

    Args:
        methods: of different classes.
        k: how many intervals.
        process: the chain.
        data: whose training split is looked at.
        bundle: a trained model of this process and data, for the methods that look at one.
        output: folder of both files.

    Returns:
        What was chosen, in the order of the methods.

    Raises:
        ValueError: no method applies, two are of one class, or the bundle is of another process or
            other data.
    """
    names = [type(method).__name__ for method in methods]
    if len(set(names)) < max(1, len(names)):
        raise ValueError(f"methods {names} must be at least one, and each of them once")
    if bundle is not None:
        _fit_together(process, data, bundle)
    writable(output)
    chosen, refused = [], {}
    for name, method in zip(names, methods):
        try:
            chosen.append(method(k, process, data, bundle))
        except ValueError as error:
            if len(methods) == 1:
                raise
            refused[name] = str(error)
    if not chosen:
        raise ValueError(f"no method applies: {'; '.join(refused.values())}")
    record = {
        "k": k,
        "process": describe(process),
        "data": data.identity(),
        "bundle": None if bundle is None else bundle.named,
        "methods": {selection.name: _record(selection) for selection in chosen},
        "left_out": refused,
    }
    if len(methods) == 1:
        record = {"edges": list(chosen[0].partition.edges), **record}
    write_json(output / "intervals.json", record)
    with replacing(output / "intervals.png") as temporary:
        selection_figure(chosen).savefig(temporary, format="png")
    print(table(chosen, refused))
    print(f"intervals: {output / 'intervals.json'}, {output / 'intervals.png'}")
    return chosen


def _fit_together(process: NoiseProcess, data: Data, bundle: Bundle) -> None:
    """Raises a ValueError unless the bundle was trained on this process and such data."""
    changed = differences(describe(bundle.denoiser.process), describe(process), "process")
    ours, theirs = bundle.manifest["shared"]["data"], data.identity()
    for key in ("shape", "scale"):
        changed += differences(ours.get(key), theirs.get(key), f"data {key}")
    if changed:
        raise ValueError(
            f"{bundle.folder} was trained otherwise than the config says ({'; '.join(changed)}): "
            "name the config that it was trained with"
        )


def _record(selection: Selection) -> dict[str, Any]:
    return {
        "edges": list(selection.partition.edges),
        "cost": selection.cost,
        "method": describe(selection.method),
        "source": selection.method.source,
        "curves": [curve._asdict() for curve in selection.curves],
    }


def table(chosen: Sequence[Selection], refused: dict[str, str]) -> str:
    """The edges of each method, and why some have none; a line each."""
    rows = {selection.name: _edges(selection) for selection in chosen}
    rows |= {name: f"left out: {reason}" for name, reason in refused.items()}
    width = max(map(len, ["method", *rows]))
    return "\n".join(
        f"{name:{width}}  {text}" for name, text in {"method": "edges", **rows}.items()
    )


def _edges(selection: Selection) -> str:
    return "  ".join(f"{edge:g}" for edge in selection.partition.edges)


def selection_figure(chosen: Sequence[Selection]) -> Figure:
    """Each method's intervals, dark (clean) to light (noisy), behind the curves it saw."""
    panels = []
    for selection in chosen:
        quantities = dict.fromkeys(curve.quantity for curve in selection.curves) or [""]
        panels += [(selection, quantity) for quantity in quantities]
    with style():
        figure = Figure(figsize=(11, 0.4 + 1.8 * len(panels)), dpi=100, layout="constrained")
        rows = figure.subplots(len(panels), sharex=True, squeeze=False).flat
        for axes, (selection, quantity) in zip(rows, panels):
            axes.set_title(f"{selection.name}: {_edges(selection)}", loc="left")
            _draw(axes, selection, quantity)
        axes.set_xlabel("progress (0 = data, 1 = noise)")
        figure.align_ylabels()
        figure.draw_without_rendering()  # only now ticks are made and take their look
    return figure


def _draw(axes: Axes, selection: Selection, quantity: str) -> None:
    intervals = selection.partition.intervals()
    colours = matplotlib.colormaps["viridis"](np.linspace(0.12, 0.92, len(intervals)))
    for interval, colour in zip(intervals, colours):
        axes.axvspan(interval.lo, interval.hi, color=colour, alpha=0.3, lw=0)
    curves = [curve for curve in selection.curves if curve.quantity == quantity]
    inks = matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(curves)))
    for curve, ink in zip(curves, inks):
        colour = INK if len(curves) == 1 else ink
        axes.plot(curve.x, curve.y, color=colour, lw=1.4, label=curve.label)
    if len(curves) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(fontsize=7, ncols=-(-len(curves) // 9), **beside)
    axes.set(xlim=(0, 1), ylabel=quantity)
    axes.spines["right"].set_visible(False)
    if not curves:
        axes.set_yticks([])
