"""The loss of each expert on each interval, its own and others (arXiv 2412.05628, figure 4c)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.experts.routed import RoutedExperts
from expertdiff.look import style
from expertdiff.methods.base import validation_t

MOST = 20
"""So many experts are asked at most, on as many intervals; of more, some at equal distances."""


@torch.no_grad()
def expert_losses(model: Denoiser, x0: Tensor, y: Tensor | None) -> dict[str, Any]:
    """The mse of experts on their own and each other's intervals, as plain data.

    All are asked about the same items, at the t and with the noise that they have in validation.

    Args:
        model: of several experts, routed or mixed.
        x0: data [n, ...], on the model's device.
        y: their labels [n], where the model has classes.

    Returns:
        items: n.
        experts: which were asked, 0 is the cleanest.
        intervals: what each of them owns, as [lo, hi].
        mse: a row for each of them, with a number for each interval.
    """
    n = len(model.partition)
    asked = torch.linspace(0, n - 1, min(n, MOST)).round().int().tolist()
    intervals = [model.partition.interval(i) for i in asked]
    index = torch.arange(len(x0), device=x0.device)
    eps = SampleNoise(0, index.tolist(), x0.shape[1:], x0.device)(0)
    x0, _ = model.from_data(x0)
    mse = []
    for i in asked:
        with _alone(model, i) as expert:
            row = []
            for interval in intervals:
                t = validation_t(expert.process, index, interval)
                told = expert(expert.process.add_noise(x0, eps, t), t, y)
                loss = losses(told, expert.prediction, expert.process, x0, eps, t).mse
                row.append(loss.double().mean().item())
            mse.append(row)
    owned = [[interval.lo, interval.hi] for interval in intervals]
    return {"items": len(x0), "experts": asked, "intervals": owned, "mse": mse}


@contextmanager
def _alone(model: Denoiser, i: int) -> Iterator[Denoiser]:
    """Expert `i` of a model, which now answers at every t."""
    if isinstance(model, RoutedExperts):
        yield model.experts[i]
        return
    model.network.active = i
    try:
        yield model
    finally:
        model.network.active = None


def best_at_home(record: dict[str, Any]) -> int:
    """On how many of the intervals of `expert_losses` nobody is better than the owner."""
    mse = np.array(record["mse"])
    return int((mse.diagonal() <= mse.min(axis=0)).sum())


def losses_figure(record: dict[str, Any]) -> Figure:
    """What `expert_losses` has found, each interval in per cent of its owner's loss."""
    mse = np.array(record["mse"])
    ratio = mse / mse.diagonal()  # of different intervals losses cannot be compared
    log = np.log(ratio)
    # Far from home experts may be worse by orders, which would leave no colour for the others.
    most = max(np.quantile(abs(log), 0.8), 1e-3)
    n = len(mse)
    with style():
        size = (1.5 + 0.46 * max(n, 6), 1 + 0.25 * max(n, 6))
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.imshow(log, vmin=-most, vmax=most, cmap="RdBu_r", aspect="auto", interpolation="none")
        for (i, j), value in np.ndenumerate(100 * (ratio - 1)):
            colour = "white" if abs(log[i, j]) > 0.7 * most else "black"
            text = "own" if i == j else f"{value:+.{0 if abs(value) >= 10 else 1}f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set(xticks=range(n), yticks=range(n), ylabel="expert (0 = cleanest)")
        axes.set(xticklabels=record["experts"], yticklabels=record["experts"])
        axes.set(xlabel="interval of expert", title="loss over the owner's, per cent")
        figure.draw_without_rendering()  # only now ticks are made and take their look
    return figure
