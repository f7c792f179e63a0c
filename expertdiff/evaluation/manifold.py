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

Distance = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Of features [M, D] that are cast once: a function from features [N, D] to distances [N, M]."""


def euclidean(to: Tensor) -> Callable[[Tensor], Tensor]:
    """Distances in float64."""
    to = _float64(to)
    return lambda x: torch.cdist(_float64(x), to)


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have none


def adm_float16(to: Tensor) -> Callable[[Tensor], Tensor]:
    """Squared distances with the rounding of ADM's evaluator: float16 if none overflows.

    It moves precision and recall by up to .003. The products of a row are summed in float32, as
    GPUs do.
    """
    to16, rounded_to = to.half(), to.half().float()
    squares = to16.square().sum(1)

    def distances(x: Tensor) -> Tensor:
        x16 = x.half()
        products = (x16.float() @ rounded_to.T).half()
        rounded = (x16.square().sum(1)[:, None] - 2 * products + squares).clamp(min=0)
        return rounded.float() if rounded.isfinite().all() else euclidean(to)(x).square().float()

    return distances


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
        distances = distance(features)
        radii = [distances(x).kthvalue(K + 1).values for x in features.split(ROWS)]
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
    to_reference = distance(reference.features.to(samples.features.device))
    inside, covered = [], torch.zeros(len(reference.features), dtype=torch.bool)
    for rows, radii in zip(samples.features.split(ROWS), samples.radii.split(ROWS)):
        distances = to_reference(rows)
        inside.append((distances <= reference.radii.to(distances.device)).any(1).cpu())
        covered |= (distances <= radii[:, None]).any(0).cpu()
    precision, recall = (x.double().mean().item() for x in (torch.cat(inside), covered))
    return {"precision": precision, "recall": recall}
