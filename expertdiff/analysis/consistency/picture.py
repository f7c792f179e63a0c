"""Samples of several models from the same noise, one set below or beside the other."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from expertdiff.analysis.consistency.rows import Row
from expertdiff.evaluation.points import limits_of
from expertdiff.look import style

SHOWN = 12
"""Images of each model."""

PANELS = 4
"""Scatter plots on a line."""


def picture(drawn: dict[str, Tensor], rows: Sequence[Row], feature: str) -> Figure:
    """The samples of each model under its scores: a line of images, or a scatter plot.

    Images below one another are of the same noise, and so are points of one colour.

    Args:
        drawn: the samples of each model, A's first.
        rows: what is told of them, in the same order.
        feature: what the scores are about.
    """
    sets = list(drawn.values())
    with style():
        figure = (_points if sets[0].ndim == 2 else _images)(sets)
        for axes, name, row in zip(figure.axes, drawn, rows):
            key = next(iter(row.to_a))
            scores = f"{row.to_a[key]:.3f} to A, {row.to_b[key]:.3f} to B"
            axes.set_title(f"{name}\n{key} {scores}", loc="left")
        figure.suptitle(f"feature: {feature}", x=0.01, ha="left", size=8, wrap=True)
        for axes in figure.axes:
            axes.set_axis_off()
    return figure


def _images(sets: Sequence[Tensor]) -> Figure:
    figure = Figure(figsize=(11, 1.5 * len(sets) + 0.3), dpi=100, layout="constrained")
    for axes, images in zip(figure.subplots(len(sets)), sets):
        strip = torch.cat(list(images[:SHOWN]), dim=-1).expand(3, -1, -1)
        axes.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_anchor("W")
    return figure


def _points(sets: Sequence[Tensor]) -> Figure:
    lines = -(-len(sets) // PANELS)
    figure = Figure(figsize=(11, 3.2 * lines + 0.3), dpi=100, layout="constrained")
    (left, bottom), (right, top) = limits_of(torch.cat(list(sets)))
    for axes, points in zip(figure.subplots(lines, PANELS, squeeze=False).flat, sets):
        axes.scatter(*points.T.numpy(), s=3, c=sets[0][:, 0].numpy(), cmap="viridis", linewidths=0)
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return figure
