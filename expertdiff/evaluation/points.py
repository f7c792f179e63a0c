"""Points in the plane: how far two sets are apart, which modes they hit, and their files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist

from expertdiff.diffusion.exact import Mixture
from expertdiff.evaluation.knn_kl import Points, as_array
from expertdiff.files import replacing

REACH = 3.5
"""Standard deviations within which a sample belongs to a mode: 99.8 % of a Gaussian's."""

STRAY = (0.002, 0.998)
"""Quantiles along each axis between which a picture shows points, unless told."""

KERNEL_POINTS = 5000
"""Of each set, for `mmd`: its cost is quadratic."""

COLOUR = "#0072b2"
"""Of the dots: readable on a light and on a dark page."""

Limits = tuple[np.ndarray, np.ndarray]


def sliced_wasserstein(a: Points, b: Points, projections: int = 128) -> float:
    """The mean over directions of the Wasserstein-1 distance of projections, in units of the data.

    The directions stand at equal angles over the half circle, so nothing is random. Between a set
    and its copy shifted by s it is 2/pi |s|. Bonneel et al. 2015, with W1.

    Args:
        a: [n, 2].
        b: [m, 2]; m may differ from n, as the distance is that of the quantile functions.
        projections: number of directions.

    Raises:
        ValueError: not [n, 2], not finite, or no direction.
    """
    from scipy.stats import wasserstein_distance  # slow to import

    a, b = _plane(a), _plane(b)
    if projections < 1:
        raise ValueError(f"projections = {projections} leave nothing to average: give at least 1")
    angles = np.pi * (np.arange(projections) + 0.5) / projections
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return float(np.mean([wasserstein_distance(a @ e, b @ e) for e in directions]))


def mmd(a: Points, b: Points) -> float:
    """The squared maximum mean discrepancy of two sets, unbiased: 0 on average for equal ones.

    Gretton et al. 2012, equation 3, with the kernel exp(-|x - y|^2 / (2 h^2)), where h is the
    median distance of two points of `a`. Only the first 5,000 points of each set count.

    Args:
        a: the reference [n, 2], n >= 2.
        b: [m, 2], m >= 2.

    Raises:
        ValueError: not [n, 2], not finite, fewer than 2 points, or a median distance of 0.
    """
    a, b = _plane(a)[:KERNEL_POINTS], _plane(b)[:KERNEL_POINTS]
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} points given: mmd needs 2 of each")
    h = np.median(pdist(a), overwrite_input=True)
    if h == 0:
        raise ValueError(
            f"half of the pairs of the {len(a)} reference points coincide, which leaves no "
            "bandwidth: remove duplicates"
        )
    # In units of h; by rows, as all pairs at once would take hundreds of megabytes.
    a, b = a / h, b / h
    within = [(_kernel_sum(x, x) - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(within) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    rows = np.array_split(a, -(-len(a) // 500))
    return sum(np.exp(-cdist(some, b, "sqeuclidean") / 2).sum() for some in rows)


def mode_coverage(samples: Points, modes: Mixture) -> dict[str, float]:
    """Which modes of a mixture samples [n, 2] hit, how evenly, and how widely.

    A sample hits its nearest centre if it lies within 3.5 standard deviations of it, distances
    being measured in units of the modes' standard deviation along each axis.

    Returns:
        modes: how many are hit at least once.
        within: share of the samples that hit, in [0, 1]; .998 for the mixture's own samples.
        tv: total variation between the modes' shares of the hits and their true shares, in [0, 1].
        width: the hits' root mean square distance from their centre along an axis, over the true
            standard deviation, median over the modes that are hit; .993 for the mixture's own
            samples, NaN where nothing is hit.

    Raises:
        ValueError: not [n, 2], not finite, or modes without a width.
    """
    std = np.asarray(modes.std, dtype=np.float64)
    if not (std > 0).all():
        raise ValueError(f"modes of standard deviation {std.tolist()} cannot be hit: give above 0")
    distance, nearest = cKDTree(as_array(modes.centres) / std).query(_plane(samples) / std)
    hits = distance <= REACH
    counts = np.bincount(nearest[hits], minlength=len(modes.centres))
    squares = np.bincount(nearest[hits], distance[hits] ** 2, minlength=len(modes.centres))
    hit = counts > 0
    shares = counts / max(counts.sum(), 1)
    common = np.minimum(shares, np.asarray(modes.shares, dtype=np.float64)).sum()
    return {
        "modes": int(hit.sum()),
        "within": float(hits.mean()),
        "tv": max(0.0, float(1 - common)),
        "width": float(np.median(np.sqrt(squares[hit] / counts[hit] / 2))) if hit.any() else np.nan,
    }


def save_points(points: Points, path: Path) -> None:
    """Points [n, 2] as CSV with the header ``x,y``; 17 digits, which is all of a float64.

    Raises:
        ValueError: not [n, 2], or not finite.
    """
    table = dict(fmt="%.17g", delimiter=",", header="x,y", comments="", encoding="utf-8")
    array = _plane(points)
    with replacing(path) as temporary:
        np.savetxt(temporary, array, **table)


def limits_of(points: Points) -> Limits:
    """The lowest and the highest corner, [2] each, of a frame around points [n, 2].

    Raises:
        ValueError: not [n, 2], or not finite.
    """
    array = _plane(points)
    lo, hi = array.min(axis=0), array.max(axis=0)
    margin = 0.05 * (hi - lo).max() or 1.0  # where all points are one
    return lo - margin, hi + margin


def scatter(axes: Axes, points: Points, limits: Limits | None = None) -> None:
    """Points [n, 2] as tiny dots, both axes to one scale and without a frame.

    Args:
        axes: to draw in.
        points: [n, 2]; those outside of `limits` are not seen.
        limits: of the picture, from `limits_of`; by default those of all but a few stray `points`,
            which else would make the others small.

    Raises:
        ValueError: not [n, 2], or not finite.
    """
    array = _plane(points)
    lo, hi = limits_of(np.quantile(array, STRAY, axis=0)) if limits is None else limits
    # Rasterised: as shapes, ten thousand dots make a vector picture of megabytes.
    axes.scatter(*array.T, s=1.5, color=COLOUR, alpha=0.6, linewidths=0, rasterized=True)
    axes.set(xlim=(lo[0], hi[0]), ylim=(lo[1], hi[1]), aspect="equal")
    axes.set_axis_off()


def save_scatter(points: Points, path: Path, limits: Limits | None = None) -> None:
    """A PNG of 600 x 600 pixels of points [n, 2]; see `scatter`.

    Raises:
        ValueError: not [n, 2], or not finite.
    """
    figure = Figure(figsize=(6, 6), dpi=100)
    scatter(figure.add_axes((0, 0, 1, 1)), points, limits)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_scatters(
    sets: Sequence[Points], titles: Sequence[str], path: Path, limits: Limits
) -> None:
    """A PNG of sets of points [n, 2] side by side, each below its title; see `scatter`.

    Raises:
        ValueError: not [n, 2], or not finite.
    """
    figure = Figure(figsize=(1.6 * len(sets), 1.8), dpi=100, layout="constrained")
    for axes, points, title in zip(figure.subplots(1, len(sets)), sets, titles):
        scatter(axes, points, limits)
        axes.set_title(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _plane(points: Points) -> np.ndarray:
    array = as_array(points)
    if array.shape[1] != 2:
        raise ValueError(f"points of shape {list(array.shape)} given: [n, 2] is needed")
    return array
