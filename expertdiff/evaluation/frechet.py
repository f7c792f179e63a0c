"""The Frechet distance between two sets of features, and reference statistics kept on disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expertdiff.files import replacing


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features, on the CPU.

    Attributes:
        mean: [D], float64.
        cov: [D,D], float64, divided by count - 1.
        count: how many images; at least 2.

    Raises:
        ValueError: fewer than 2 images, shapes that do not fit, or values that are not finite.
    """

    mean: Tensor
    cov: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} images: a covariance needs at least 2")
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
    fewer, more = sorted((a, b), key=lambda statistics: statistics.count)
    factor = _factor(fewer.cov)
    root = torch.linalg.eigvalsh(factor.T @ more.cov @ factor).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    return max(0.0, distance.item())


def _factor(cov: Tensor) -> Tensor:
    """F [D,r] with F F^T = `cov`, of rank r."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return factor
    # Singular: fewer images than dimensions, or features that never change.
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1] * len(cov) * torch.finfo(cov.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def cached_statistics(
    folder: Path,
    compute: Callable[[], Statistics],
    *,
    data_digest: str,
    count: int,
    resolution: int,
    extractor: str,
) -> Statistics:
    """The statistics of a real set, from `folder` if they were computed for the very same thing.

    The file's name is the SHA-256 of all that the numbers depend on, so other images, weights or
    sizes never meet an old file; one that is truncated or renamed is computed again. Any number of
    processes may call this at once: files appear whole.

    Args:
        folder: created if need be.
        compute: called when there is no such file.
        data_digest: identifies the images' bytes and their order.
        count: how many images.
        resolution: their side in pixels, as the extractor gets them.
        extractor: `FeatureExtractor.identity`.
    """
    key = json.dumps([data_digest, count, resolution, extractor])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    statistics = _read(path, key)
    if statistics is None:
        statistics = compute()
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file, key=key, mean=statistics.mean, cov=statistics.cov, count=statistics.count
            )
    return statistics


def _read(path: Path, key: str) -> Statistics | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = torch.from_numpy(file["mean"]), torch.from_numpy(file["cov"])
            return Statistics(mean, cov, int(file["count"])) if file["key"] == key else None
    except Exception:  # absent or broken in whatever way: it can be computed again
        return None
