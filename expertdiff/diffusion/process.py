"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """`coefficient` [B] as [B, 1, ...] in `like`'s dtype, so that it multiplies `like` [B, ...]."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(Described, nn.Module, ABC):
    """A Gaussian noising of data; schedules in float64, samples in the data's own type."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha [B] and sigma [B] in float64, on t's device."""

    @abstractmethod
    def progress(self, t: Tensor) -> Tensor:
        """Where t [B] lies on the line from data (0) to noise (1]: float64."""

    @abstractmethod
    def times(self, u: Tensor, interval: Interval) -> Tensor:
        """The t at fractions u [B] in [0, 1) of an interval: uniform u give uniform t."""

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2, float64 [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] = alpha x0 + sigma eps."""
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


class Betas(Described, ABC):
    """A schedule of per-step noise variances."""

    @abstractmethod
    def __call__(self, T: int) -> Tensor:
        """beta_t for t = 0..T-1, float64 [T]."""


class LinearBetas(Betas):
    """beta from `first` to `last` in equal steps (DDPM, Ho et al. 2020, section 4)."""

    def __init__(self, first: float = 1e-4, last: float = 0.02) -> None:
        self.first, self.last = first, last

    def __call__(self, T: int) -> Tensor:
        return torch.linspace(self.first, self.last, T, dtype=torch.float64)


class QuadraticBetas(LinearBetas):
    """sqrt(beta) from sqrt(first) to sqrt(last) in equal steps."""

    def __call__(self, T: int) -> Tensor:
        roots = math.sqrt(self.first), math.sqrt(self.last)
        return torch.linspace(*roots, T, dtype=torch.float64).square()


class CosineBetas(Betas):
    """alpha_bar(u) = cos^2((u + s)/(1 + s) pi/2), betas capped (arXiv 2102.09672, eq. 17)."""

    def __init__(self, s: float = 0.008, max_beta: float = 0.999) -> None:
        self.s, self.max_beta = s, max_beta

    def __call__(self, T: int) -> Tensor:
        u = torch.arange(T + 1, dtype=torch.float64) / T
        alpha_bar = torch.cos((u + self.s) / (1 + self.s) * math.pi / 2).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.max_beta)


class DiscreteVP(NoiseProcess):
    """The variance-preserving chain of DDPM: t int64 in [0, T), alpha^2 + sigma^2 = 1.

    Args:
        betas: the schedule.
        T: number of timesteps.

    Raises:
        ValueError: T < 2, or betas outside (0, 1).
    """

    betas: Tensor
    alpha_bar: Tensor

    def __init__(self, betas: Betas, T: int = 1000) -> None:
        super().__init__()
        if T < 2:
            raise ValueError(f"T = {T} timesteps make no chain: give at least 2")
        beta = betas(T)
        if not ((0 < beta) & (beta < 1)).all():
            raise ValueError(f"betas must lie in (0, 1), not in [{beta.min():g}, {beta.max():g}]")
        self.T = T
        # Tables, not state: rebuilt from the description, never averaged or checkpointed.
        self.register_buffer("betas", beta, persistent=False)
        self.register_buffer("alpha_bar", (1 - beta).cumprod(0), persistent=False)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(t.device)[t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def progress(self, t: Tensor) -> Tensor:
        return (t + 1).double() / self.T

    def times(self, u: Tensor, interval: Interval) -> Tensor:
        steps = interval.steps(self.T)
        if not steps:
            raise ValueError(
                f"interval {interval} holds none of the {self.T} timesteps: use fewer experts"
            )
        # In float64 floor(u n) < n for every float32 u < 1.
        return steps.start + (u.double() * len(steps)).long()

    def posterior_log_variance(self, t: Tensor) -> Tensor:
        """log beta~_t, the variance of q(x_{t-1} | x_t, x0); at t = 0, where it is 0, beta~_1."""
        t = t.clamp(min=1)
        alpha_bar = self.alpha_bar.to(t.device)
        beta = self.betas.to(t.device)[t]
        return ((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta).log()
