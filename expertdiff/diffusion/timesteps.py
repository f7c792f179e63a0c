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
