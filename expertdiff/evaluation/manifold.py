"""Precision and recall: which samples lie where real images are, and the other way round.

Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 to 3, as ADM's evaluator counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

K = 3
"""Which neighbour's distance is the radius of an image's ball."""

ROWS = 1000
"""Images whose distances to a whole set are held at a time."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of features [N, D] and [M, D]: [N, M], in any unit that grows with the distance."""


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Distances [N, M] in float64, of features [N, D] and [M, D]."""
    if a.device.type == "mps":  # Apple's GPUs have no float64
        a, b = a.cpu(), b.cpu()
    return torch.cdist(a.double(), b.double())


def adm_float16(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [N, M] with the rounding of ADM's evaluator: float16 if none overflows.

    It moves precision and recall by up to .003. The products of a row are summed in float32, as
    GPUs do.
    """
    a16, b16 = a.half(), b.half()
    products = (a16.float() @ b16.float().T).half()
    squares = [(x * x).sum(1) for x in (a16, b16)]
    rounded = (squares[0][:, None] - 2 * products + squares[1]).clamp(min=0)
    return rounded.float() if rounded.isfinite().all() else euclidean(a, b).square().float()


@dataclass(frozen=True, eq=False)
class Manifold:
    """A set of images as balls in feature space.

    Attributes:
        features: the centres [N, D], float32.
        radii: the distances [N] to the third nearest other image of the set, or their squares.
    """

    features: Tensor
    radii: Tensor

    @classmethod
    def of(cls, features: Tensor, distance: Distance = euclidean) -> "Manifold":
        """The balls of features [N, D].

        Raises:
            ValueError: fewer than 4 images.
        """
        if len(features) <= K:
            raise ValueError(
                f"precision and recall of {len(features)} images: give at least {K + 1}, as each "
                f"needs {K} others"
            )
        # The first neighbour of an image is the image itself.
        radii = [distance(x, features).kthvalue(K + 1).values for x in features.split(ROWS)]
        return cls(features, torch.cat(radii))


def precision_recall(
    samples: Manifold, reference: Manifold, distance: Distance = euclidean
) -> dict[str, float]:
    """The share of samples inside any ball of the reference, and the other way round.

    Args:
        samples: on the device that computes.
        reference: on any device.
        distance: what the radii of both were made with.

    Returns:
        precision, recall: in [0, 1].
    """
    features = reference.features.to(samples.features.device)
    inside, covered = [], torch.zeros(len(features), dtype=torch.bool)
    for rows, radii in zip(samples.features.split(ROWS), samples.radii.split(ROWS)):
        distances = distance(rows, features)
        inside.append((distances <= reference.radii.to(distances.device)).any(1).cpu())
        covered |= (distances <= radii[:, None]).any(0).cpu()
    precision, recall = (x.double().mean().item() for x in (torch.cat(inside), covered))
    return {"precision": precision, "recall": recall}
