"""Which timesteps a training batch draws."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess


class TimestepSampler(Described, ABC):
    """Draws t inside an interval, with the importance weight that keeps the loss unbiased."""

    @abstractmethod
    def sample(
        self, n: int, interval: Interval, generator: torch.Generator, process: NoiseProcess
    ) -> tuple[Tensor, Tensor]:
        """t [n] and weight [n] (float32), on the generator's device."""


class Uniform(TimestepSampler):
    """Every t of the interval alike."""

    def sample(
        self, n: int, interval: Interval, generator: torch.Generator, process: NoiseProcess
    ) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=generator, device=generator.device)
        return process.times(u, interval), torch.ones(n, device=generator.device)


class CleanBiased(TimestepSampler):
    """Uniform, but a share of the draws is squeezed into the clean end of the interval.

    Where sharp data need most of the training. The loss is not made unbiased again: the clean end
    counts more, as with a weighting, but without the noise of large weights.

    Args:
        share: of the draws that are squeezed, in [0, 1].
        into: the fraction of the interval, from its clean end, that they are squeezed into.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, share: float = 0.5, into: float = 0.2) -> None:
        if not (0 <= share <= 1 and 0 < into <= 1):
            raise ValueError(f"share {share} must be in [0, 1] and into {into} in (0, 1]")
        self.share, self.into = share, into

    def sample(
        self, n: int, interval: Interval, generator: torch.Generator, process: NoiseProcess
    ) -> tuple[Tensor, Tensor]:
        u, chosen = torch.rand(2, n, generator=generator, device=generator.device)
        u = torch.where(chosen < self.share, self.into * u, u)
        return process.times(u, interval), torch.ones(n, device=generator.device)
