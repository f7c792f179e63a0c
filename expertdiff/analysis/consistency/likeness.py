"""How alike single items are: images by the cosine of their features, points by their distance."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from expertdiff.evaluation.features import FeatureExtractor

ALIKE = 0.6
"""The cosine above which two images count as the same (Zhang et al. 2023, arXiv:2310.05264)."""

Scores = dict[str, float]


class Likeness(ABC):
    """How alike items are, by their features.

    Attributes:
        feature: what is compared.
    """

    feature: str

    @abstractmethod
    def features(self, items: Tensor) -> Tensor:
        """[N, D], float32, on the CPU, of items [N, ...] as their data set holds them."""

    @abstractmethod
    def pairs(self, a: Tensor, b: Tensor) -> Scores:
        """Of each row of a [N, D] and the same row of b [N, D]."""

    @abstractmethod
    def nearest(self, a: Tensor, real: Iterable[Tensor]) -> Tensor:
        """[N]: of each row of a [N, D] and the most alike row of all parts [M, D] of `real`."""

    @abstractmethod
    def summary(self, values: Tensor) -> Scores:
        """What is told of values [N] of `nearest`."""


class Cosine(Likeness):
    """Images: the cosine of their features, which the caller centres, and their squared error.

    The share of pairs above a cosine of 0.6 is that of Zhang et al. 2023, on another feature: no
    number can be compared with theirs.

    Args:
        extractor: of the features.
        device: where they are computed.
    """

    def __init__(self, extractor: FeatureExtractor, device: torch.device) -> None:
        self.extractor, self.device = extractor, device
        self.feature = f"{extractor.embedding_name}; less the mean of A's and B's samples"

    def features(self, items: Tensor) -> Tensor:
        return self.extractor.embedding(self.extractor.features(items, self.device)).cpu()

    def pairs(self, a: Tensor, b: Tensor) -> Scores:
        # The root of a product, not a product of roots: of equal rows it is exactly 1.
        norms = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
        cosines = (a * b).sum(1) / norms.clamp(min=torch.finfo(a.dtype).tiny)
        return self.summary(cosines) | {"MSE": (a - b).square().mean().item()}

    def nearest(self, a: Tensor, real: Iterable[Tensor]) -> Tensor:
        a = F.normalize(a)
        return torch.stack([(a @ F.normalize(part).T).amax(1) for part in real]).amax(0)

    def summary(self, values: Tensor) -> Scores:
        share = (values > ALIKE).double().mean()
        return {"cosine": values.double().mean().item(), f"share > {ALIKE}": share.item()}


class Distance(Likeness):
    """Points: their root mean square distance, in units of the data as a model sees them."""

    feature = "coordinates"

    def features(self, items: Tensor) -> Tensor:
        return items

    def pairs(self, a: Tensor, b: Tensor) -> Scores:
        return self.summary((a - b).norm(dim=1))

    def nearest(self, a: Tensor, real: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.cdist(a, part).amin(1) for part in real]).amin(0)

    def summary(self, values: Tensor) -> Scores:
        return {"RMS distance": values.double().square().mean().sqrt().item()}
