"""The Frechet distance between two sets of features."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features, on the CPU.

    Attributes:
        mean: [D], float64.
        cov: [D,D], float64, divided by count - 1.
        count: how many images, at least 2; ``None`` where a file does not tell.

    Raises:
        ValueError: fewer than 2 images, shapes that do not fit, or values that are not finite.
    """

    mean: Tensor
    cov: Tensor
    count: int | None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 2:
            raise ValueError(
                f"statistics of {self.count} images: a covariance needs at least 2, so give more"
            )
        if self.mean.ndim != 1 or self.cov.shape != 2 * self.mean.shape:
            shapes = f"mean {list(self.mean.shape)} and covariance {list(self.cov.shape)}"
            raise ValueError(f"{shapes} do not fit: give [D] and [D, D]")
        # Before any eigenvalue: LAPACK may abort the whole process on NaN (pytorch #93124).
        if not (self.mean.isfinite().all() and self.cov.isfinite().all()):
            raise ValueError("features are not finite: an image or a weight is NaN or infinite")

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """The statistics of features [N,D]."""
        features = features.detach().cpu().double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), at least 0.

    FID of Heusel et al. 2017, equation 6. Equal sets come out a rounding error beside 0, and below
    it is returned as 0. With F F^T = cov_a the trace of the root is the sum of the square roots of
    the eigenvalues of F^T cov_b F, which is symmetric: faster and safer than a matrix root.

    Raises:
        ValueError: features of different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared: "
            "use one extractor and one resolution for both sets"
        )
    # The set of fewer images has the lower rank: less rounding, and the same number for (b, a).
    fewer, more = sorted((a, b), key=lambda statistics: statistics.count or math.inf)
    factor = _factor(fewer.cov)
    root = torch.linalg.eigvalsh(factor.T @ more.cov @ factor).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    return max(0.0, distance.item())


def _factor(cov: Tensor) -> Tensor:
    """F [D,r] with F F^T = `cov`, of rank r: the Cholesky factor, pivoted, as r may be below D.

    Fewer images than dimensions, or features that never change, are singular.
    """
    packed, pivots, rank, _ = dpstrf(cov.numpy(), lower=1)
    factor = np.zeros((len(cov), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return torch.from_numpy(factor)
