"""Who denoises where and when: the weights of a soft gate over the plane and along the chain."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.evaluation.points import Limits, limits_of
from expertdiff.experts.gated import GatedExperts
from expertdiff.look import INK, style

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the experts, in turn: apart for every kind of colour vision."""

EVEN = "#c4c4c4"
"""Where two experts count alike: between their colours, and visible on white."""

DECIDED = 0.98
"""The weight from which on one expert acts alone."""

CELLS = 100
"""Of a map, along each axis."""

DOTS = 300
"""Of the noised data, on a map."""

TIMES = 25
"""Points of the chain at which the weights are drawn; odd, so that the middle is one."""


@torch.no_grad()
def gate_weights(network: GatedExperts, process: NoiseProcess, x0: Tensor, t: Tensor) -> Tensor:
    """The gate's weights [K, n, N] at x_t, made of data x0 [n, 2] for each t [K].

    Each point has one noise, the same at every t.

    Args:
        network: of N experts.
        process: the noise process it was trained with.
        x0: [n, 2], on the network's device.
        t: points of the chain.
    """
    # One by one: the embedding makes hundreds of numbers of a point.
    return torch.stack([network.weights(x_t, s) for s, x_t in _noised(process, x0, t)])


def _noised(process: NoiseProcess, x0: Tensor, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each t as [n], with its x_t [n, 2]."""
    eps = SampleNoise(0, range(len(x0)), x0.shape[1:], x0.device)(0)
    for times in t.to(x0.device)[:, None].expand(-1, len(x0)):
        yield times, process.add_noise(x0, eps, times)


def _times(process: NoiseProcess, n: int) -> Tensor:
    """`n` points of the chain from the cleanest to the noisiest, at equal distances."""
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    return process.times(u.clamp(max=1 - 1e-9), Interval())


def gate_record(network: GatedExperts, process: NoiseProcess, x0: Tensor) -> dict[str, Any]:
    """How the gate weighs its experts on noised data x0 [n, 2], as plain data.

    Returns:
        t: the cleanest and the noisiest point of the chain.
        mean: of the weights over the points; for each t a list of one number an expert.
        std: likewise.
        decided: share of the points, at the cleanest t, where one expert has at least 0.98.
    """
    t = _times(process, 2)
    weights = gate_weights(network, process, x0, t)
    return {
        "t": t.tolist(),
        "mean": weights.mean(1).tolist(),
        "std": weights.std(1, correction=0).tolist(),
        "decided": (weights[0].amax(-1) >= DECIDED).double().mean().item(),
    }


@torch.no_grad()
def gate_figure(network: GatedExperts, process: NoiseProcess, x0: Tensor) -> Figure:
    """How the weights are spread, how they change along the chain, and where they are what.

    Colours stand for the first expert's weight or, of more than two experts, for the one that
    weighs most; dots on a map are noised data.

    Args:
        network: of N experts.
        process: the noise process it was trained with.
        x0: the data [n, 2], on the network's device; the maps have their frame.
    """
    t = _times(process, TIMES)
    few = t[[0, TIMES // 2, -1]]
    weights = gate_weights(network, process, x0, t).cpu().numpy()
    n, frame = weights.shape[-1], limits_of(x0)
    with style():
        figure = Figure(figsize=(11, 5.8), dpi=100, layout="constrained")
        upper, lower = figure.subfigures(2, height_ratios=[3.2, 2.2])
        spread, chain = upper.subplots(1, 2)
        _draw_spread(spread, weights[[0, TIMES // 2, -1]], few)
        _draw_chain(chain, weights, t.numpy())
        panels = lower.subplots(1, 4)
        data, *maps = panels
        _draw_data(data, x0, weights[0])
        data.set_title(f"the data, t = {t[0]:g}", loc="center")
        for axes, (times, x_t) in zip(maps, _noised(process, x0[:DOTS], few)):
            _draw_map(axes, network, times[0], frame)
            axes.scatter(*x_t.cpu().numpy().T, s=1, color=INK, alpha=0.5, linewidths=0)
            axes.set_title(f"t = {times[0]:g}, dots: noised data", loc="center")
        for axes in panels:
            axes.set(xlim=(frame[0][0], frame[1][0]), ylim=(frame[0][1], frame[1][1]))
            axes.set_aspect("equal")
            axes.set_axis_off()
        _draw_scale(lower, panels, n)
        figure.draw_without_rendering()  # only now ticks are made and take their look
    return figure


def _draw_spread(axes: Axes, weights: np.ndarray, t: Tensor) -> None:
    """Histograms of weights [K, n, N] at t [K]: of the first of two experts, or of all at t[0]."""
    if weights.shape[-1] == 2:
        rows, labels = weights[..., 0], [f"t = {s:g}" for s in t]
        colours = matplotlib.colormaps["viridis"](np.linspace(0.12, 0.85, len(t)))
        axes.set(title="how often expert 0 has which weight")
        axes.set_xlabel("weight (1 = expert 0 alone, 0 = expert 1 alone)")
    else:
        rows, labels, colours = weights[0].T, _names(weights.shape[-1]), _colours(weights.shape[-1])
        axes.set(title=f"how often an expert has which weight, t = {t[0]:g}")
        axes.set_xlabel("weight (1 = this expert alone)")
    edges = np.linspace(0, 1, 41)
    for row, label, colour in zip(rows, labels, colours):
        shares = np.histogram(row, edges)[0] / len(row)
        axes.stairs(shares, edges, color=colour, lw=1.6, label=label)
    axes.set(ylabel="share of the points", xlim=(0, 1), ylim=(0, None))
    axes.legend()


def _draw_chain(axes: Axes, weights: np.ndarray, t: np.ndarray) -> None:
    """The mean of weights [K, n, N] over the points, and one standard deviation, against t [K]."""
    mean, std = weights.mean(1), weights.std(1)
    low, high = (mean - std).clip(min=0), (mean + std).clip(max=1)
    for i, (name, colour) in enumerate(zip(_names(mean.shape[-1]), _colours(mean.shape[-1]))):
        axes.fill_between(t, low[:, i], high[:, i], color=colour, alpha=0.2, lw=0)
        axes.plot(t, mean[:, i], color=colour, label=name)
    axes.set(title="weights along the chain: mean and one std", ylabel="weight", ylim=(0, 1))
    axes.set(xlabel=f"t ({t[0]:g} = data, {t[-1]:g} = noise)", xlim=(t[0], t[-1]))
    axes.legend()


def _draw_data(axes: Axes, x0: Tensor, weights: np.ndarray) -> None:
    """The points x0 [n, 2] in the colours of their weights [n, N]."""
    look = _scale(weights.shape[-1])
    colours = dict(c=_shown(weights), cmap=look.cmap, norm=look.norm)
    axes.scatter(*x0.cpu().numpy().T, s=4, linewidths=0, **colours)


def _draw_map(axes: Axes, network: GatedExperts, t: Tensor, frame: Limits) -> None:
    """The gate at the cells of a grid over `frame`, all as x_t at one t."""
    (left, bottom), (right, top) = (corner.tolist() for corner in frame)
    middles = (torch.arange(CELLS, device=t.device) + 0.5) / CELLS
    x, y = left + (right - left) * middles, bottom + (top - bottom) * middles
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    weights = network.weights(grid, t.expand(CELLS, CELLS)).cpu().numpy()
    look = _scale(weights.shape[-1])
    image = dict(origin="lower", extent=(left, right, bottom, top), interpolation="nearest")
    axes.imshow(_shown(weights), cmap=look.cmap, norm=look.norm, **image)


def _shown(weights: np.ndarray) -> np.ndarray:
    """What a colour stands for at each of weights [..., N]."""
    return weights[..., 0] if weights.shape[-1] == 2 else weights.argmax(-1)


def _scale(n: int) -> ScalarMappable:
    """The colours of what is `_shown` of `n` experts."""
    if n == 2:
        ends = LinearSegmentedColormap.from_list("gate", [COLOURS[1], EVEN, COLOURS[0]])
        return ScalarMappable(Normalize(0, 1), ends)
    return ScalarMappable(Normalize(-0.5, n - 0.5), ListedColormap(_colours(n)))


def _draw_scale(figure: SubFigure, panels: Sequence[Axes], n: int) -> None:
    bar = figure.colorbar(_scale(n), ax=panels)
    bar.outline.set_visible(False)
    if n == 2:
        bar.set_ticks([0, 0.5, 1], labels=["0: expert 1 alone", "0.5", "1: expert 0 alone"])
        bar.set_label("weight of expert 0")
    else:
        bar.set_ticks(range(n), labels=_names(n))
        bar.set_label("expert of the largest weight")


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _names(n: int) -> list[str]:
    return [f"expert {i}" for i in range(n)]
