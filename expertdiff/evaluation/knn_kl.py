"""The Kullback-Leibler divergence between two sets of points, from nearest neighbours."""

from typing import Literal

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

Points = Tensor | np.ndarray

NORMS = {"chebyshev": np.inf, "euclidean": 2}


def knn_kl_divergence(
    real: Points,
    samples: Points,
    k: int = 5,
    metric: Literal["chebyshev", "euclidean"] = "chebyshev",
) -> float:
    """KL(real || samples) in bits, estimated from distances to k-th nearest neighbours.

    log2(m / (n - 1)) + D mean_i log2(nu_i / rho_i), where rho_i and nu_i are the distances from
    real point i to its k-th neighbour among the other real points and among the samples (Wang,
    Kulkarni and Verdu, IEEE Trans. Inf. Theory 55(5), 2009). It may fall below 0, and it is too low
    where real points lie far from all samples: judge it by what fresh real points score, and look
    at the opposite direction, with the arguments swapped, too.

    Args:
        real: [n, D].
        samples: [m, D].
        k: which neighbour, from 1 to min(n, m) - 1.
        metric: of the distances; the divergence itself depends on none.

    Raises:
        ValueError: k too large or below 1, no such metric, different dimensions, points that are
            not finite, or so many duplicates that a distance is 0.
    """
    real, samples = as_array(real), as_array(samples)
    (n, dimensions), (m, theirs) = real.shape, samples.shape
    if dimensions != theirs:
        raise ValueError(
            f"real points of {dimensions} and samples of {theirs} dimensions cannot be compared: "
            "give both the same"
        )
    if not 1 <= k < min(n, m):
        raise ValueError(
            f"k = {k} neighbours cannot be had from n = {n} real points and m = {m} samples: "
            "give a k from 1 to min(n, m) - 1, or more points"
        )
    if metric not in NORMS:
        raise ValueError(f"metric {metric!r} must be one of {', '.join(NORMS)}")
    # A real point is its own first neighbour.
    rho = cKDTree(real).query(real, [k + 1], p=NORMS[metric])[0]
    nu = cKDTree(samples).query(real, [k], p=NORMS[metric])[0]
    if not (rho.all() and nu.all()):
        raise ValueError(
            f"{np.sum(rho == 0)} of the {n} points have {k} or more duplicates in their own set "
            f"and {np.sum(nu == 0)} in the other, which gives ln 0: remove duplicates, or raise k"
        )
    return float(np.log2(m / (n - 1)) + dimensions * (np.log2(nu).mean() - np.log2(rho).mean()))


def as_array(points: Points) -> np.ndarray:
    """Points [n, D] in float64, on the CPU.

    Raises:
        ValueError: another shape, no point at all, or a value that is not finite.
    """
    if isinstance(points, Tensor):
        points = points.detach().cpu().double().numpy()
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"points of shape {list(array.shape)} given: [n, D] is needed")
    bad = np.sum(~np.isfinite(array).all(axis=1))
    if bad:
        raise ValueError(
            f"{bad} of {len(array)} points hold NaN or infinity: the sampler or its network "
            "diverged, or the data are damaged"
        )
    return array
