"""The judge of points on the plane."""

import numpy as np
from torch import Tensor

from expertdiff.evaluation.judge import Judge
from expertdiff.evaluation.knn_kl import as_array, knn_kl_divergence
from expertdiff.evaluation.points import mmd, sliced_wasserstein


class PointCloud(Judge):
    """Points against points: KL in both directions, sliced Wasserstein-1, squared MMD.

    Args:
        k: of the nearest-neighbour estimate of KL, see `knn_kl_divergence`.
    """

    metric = "KL"
    estimate = True

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        self.k = k

    @property
    def identity(self) -> str:
        return f"k-NN estimate in bits, k = {self.k}, Chebyshev"

    def forward(self, samples: Tensor) -> Tensor:
        return samples

    def summary(self, features: Tensor) -> np.ndarray:
        return as_array(features)

    def distances(self, samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """KL is KL(reference || samples): it grows where real points have no samples nearby."""
        return {
            "KL": knn_kl_divergence(reference, samples, self.k),
            "reverse KL": knn_kl_divergence(samples, reference, self.k),
            "sliced W1": sliced_wasserstein(reference, samples),
            "MMD^2": mmd(reference, samples),
        }
