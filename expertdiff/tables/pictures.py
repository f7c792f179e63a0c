"""The pictures of a table of 2-D models: scores against floors, samples, and the way to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.samplers import SampleNoise, Sampler
from expertdiff.evaluation.points import COLOUR, limits_of, scatter
from expertdiff.files import replacing
from expertdiff.look import INK, style
from expertdiff.report.figures import BASELINE_COLOUR, EXPERT_COLOUR, WIDTH
from expertdiff.tables.rows import DIRECTIONS, SCORES, Row

FLOORS = {"fresh": "fresh points", "exact": "exact denoiser"}
"""The rows that no model is expected to beat, in the order in which they are shown."""

FLOOR_COLOURS = {"fresh": "#009e73", "exact": "#0072b2"}

COLUMNS = 5
"""Scatter plots on a line, which fills the page."""

FRAMES, FRAME_MS, LAST_MS = 30, 90, 2500
"""Of an animation; the samples it ends with stay longer."""


def floors_and_models(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The floors, fresh points first, and the models in their order."""
    floors = [row for floor in FLOORS for row in rows if row.model == floor]
    return floors, [row for row in rows if row.model not in FLOORS]


def colour_of(model: str, pairs: dict[str, str]) -> str:
    """Of a row: a floor's own, vermillion where the model has a control, else grey."""
    return FLOOR_COLOURS.get(model, EXPERT_COLOUR if model in pairs else BASELINE_COLOUR)


def score_figure(rows: Sequence[Row], pairs: dict[str, str]) -> Figure:
    """KL in both directions of every model: a dot a seed, a bar at the mean, floors as bands.

    One seed has no bar. A thin line joins the mean of a model and that of its control.

    Args:
        rows: of one set and one schedule.
        pairs: the control of each model that has one.
    """
    floors, models = floors_and_models(rows)
    with style():
        figure = Figure(figsize=(WIDTH, 0.27 * len(models) + 1.05), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key in zip(panels, DIRECTIONS):
            for row in floors:
                _band(axes, row, key)
            _dots(axes, models, key, pairs)
            axes.set_xlabel(f"{SCORES[key]}, bits")
            axes.spines[["left", "right"]].set_visible(False)
            axes.grid(axis="y", color=INK, alpha=0.12, lw=0.6)
            axes.tick_params(axis="y", length=0)
        sizes = ("" if row.parameters is None else f"   {row.parameters:,}" for row in models)
        labels = [row.model + size for row, size in zip(models, sizes)]
        panels[0].set_yticks(range(len(models)), labels)
        panels[0].set_ylim(len(models) - 0.5, -0.5)
        for row in floors:
            panels[0].plot([], [], color=FLOOR_COLOURS[row.model], lw=5, label=FLOORS[row.model])
        colours = {colour_of(row.model, pairs) for row in models}
        for label, colour in (("with a gate", EXPERT_COLOUR), ("single network", BASELINE_COLOUR)):
            if colour in colours:
                panels[0].plot([], [], "o", color=colour, ms=5, label=label)
        if any(len(row.seeds) > 1 for row in models):
            panels[0].plot([], [], "|", color=INK, ms=11, mew=1.8, label="mean of the seeds")
        figure.legend(loc="outside upper left", ncols=5)
    return figure


def _band(axes: Axes, row: Row, key: str) -> None:
    """From the lowest to the highest seed of a floor; its mean is a line, seen even without."""
    if values := row.scores.get(key):
        colour = FLOOR_COLOURS[row.model]
        axes.axvspan(min(values), max(values), color=colour, alpha=0.3, lw=0)
        axes.axvline(np.mean(values), color=colour, lw=1.5)


def _dots(axes: Axes, models: list[Row], key: str, pairs: dict[str, str]) -> None:
    means = {row.model: (row.mean(key), y) for y, row in enumerate(models)}
    place = {model: point for model, point in means.items() if point[0] is not None}
    for model, control in pairs.items():
        if model in place and control in place:
            axes.plot(*zip(place[model], place[control]), color=INK, alpha=0.35, lw=0.8)
    for y, row in enumerate(models):
        values = row.scores.get(key, [])
        axes.plot(values, [y] * len(values), "o", color=colour_of(row.model, pairs), ms=5,
                  alpha=0.75, mew=0)  # fmt: skip
        if len(values) > 1:  # on a single dot it would hide it
            axes.plot(row.mean(key), y, "|", color=INK, ms=11, mew=1.8)


def samples_figure(rows: Sequence[Row]) -> Figure | None:
    """Scatter plots of the first seed's samples, floors first, all in the frame of the first plot.

    Titled with the scores of this seed; ``None`` where no samples lie on disk.

    Args:
        rows: of one set and one schedule.
    """
    floors, models = floors_and_models(rows)
    files = {id(row): Path(row.folder) / f"seed-{row.seeds[0]}" / "samples.csv" for row in rows}
    shown = [row for row in [*floors, *models] if files[id(row)].is_file()]
    if not shown:
        return None
    points = [np.loadtxt(files[id(row)], delimiter=",", skiprows=1, ndmin=2) for row in shown]
    with style():
        # Twice a screen's resolution, as the dots are pixels.
        figure, panels = _panels(len(shown), COLUMNS, dpi=200)
        for axes, row, x in zip(panels, shown, points):
            scatter(axes, x, limits_of(points[0]))
            kl, reverse = (f"{row.scores[key][0]:.3f}" if row.scores.get(key) else "-"
                           for key in DIRECTIONS)  # fmt: skip
            axes.set_title(f"{FLOORS.get(row.model, row.model)}\nKL {kl}, reverse {reverse}")
    return figure


def animate(
    denoisers: dict[str, Denoiser], sampler: Sampler, path: Path, points: int = 2000
) -> None:
    """The way from noise to samples of several models side by side, as an endless GIF.

    All start from the same noise and are given the same noise on the way.

    Args:
        denoisers: by the name that stands above the plot; all of one noise process.
        sampler: how they sample.
        path: of the GIF, written whole or not at all.
        points: how many, of shape (2,).
    """
    noise = SampleNoise(0, range(points), (2,), "cpu")
    chains = [list(sampler.trajectory(denoiser, noise)) for denoiser in denoisers.values()]
    ends = np.concatenate([chains[0][0].x_t.numpy(), chains[0][-1].x_t.numpy()])
    steps = len(chains[0])
    images = []
    with style():
        figure, panels = _panels(len(denoisers), min(len(denoisers), COLUMNS), dpi=100)
        for axes, name in zip(panels, denoisers):
            scatter(axes, ends, limits_of(ends))
            axes.set_title(name)
        canvas = FigureCanvasAgg(figure)
        for k in np.unique(np.linspace(0, steps - 1, FRAMES).round().astype(int)):
            for axes, chain in zip(panels, chains):
                axes.collections[0].set_offsets(chain[k].x_t.numpy())
            t = chains[0][k].t
            figure.suptitle(f"t = {t}" if t >= 0 else "samples")
            canvas.draw()
            images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    _save_gif(images, path)


def _save_gif(images: list[Image.Image], path: Path) -> None:
    # One palette of the few colours that there are: small files, and nothing flickers.
    palette = Image.new("P", (1, 1))
    inks = [(1 - s) + s * np.array(to_rgb(c)) for c in (COLOUR, INK) for s in np.linspace(0, 1, 5)]
    palette.putpalette(np.rint(255 * np.array(inks)).astype(int).ravel().tolist())
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    with replacing(path) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def _panels(n: int, columns: int, dpi: int) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels, all of one size, with room for their titles."""
    side, lines = WIDTH / COLUMNS, -(-n // columns)
    size = (side * columns, (side + 0.4) * lines + 0.3)
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[n:]:
        unused.set_axis_off()
    return figure, axes[:n]
