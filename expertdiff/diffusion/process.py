"""Noise processes: x_t = alpha(t) x0 + sigma(t) eps."""

import math
from abc import ABC, abstractmethod
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """`coefficient` [B] as [B, 1, ...] in `like`'s dtype, so that it multiplies `like` [B, ...]."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(Described, nn.Module, ABC):
    """A Gaussian noising of data; schedules in float64, samples in the data's own type.

    Attributes:
        preserves_variance: whether alpha^2 + sigma^2 = 1.
        prior_std: of the normal distribution that sampling starts from.
    """

    preserves_variance: bool = True
    prior_std: float = 1.0

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha [B] and sigma [B] in float64, on t's device."""

    @abstractmethod
    def progress(self, t: Tensor) -> Tensor:
        """Where t [B] lies on the line from data (0) to noise (1]: float64."""

    @abstractmethod
    def times(self, u: Tensor, interval: Interval) -> Tensor:
        """The t at fractions u [B] in [0, 1) of an interval: uniform u give uniform t."""

    @abstractmethod
    def visited(self, steps: int | str | None) -> Tensor:
        """The t at which a sampler of so many steps calls the denoiser, noisiest first.

        Raises:
            ValueError: `steps` is not understood, or cannot be had.
        """

    @abstractmethod
    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t [B] of ln(alpha^2 / sigma^2) [B]; where there are timesteps, the nearest."""

    def condition(self, t: Tensor) -> Tensor:
        """What the network is told of t."""
        return t

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

    def visited(self, steps: int | str | None) -> Tensor:
        return torch.tensor(spaced(self.T, steps)[::-1])

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        falling = (self.alpha_bar / (1 - self.alpha_bar)).log().to(log_snr.device)
        return torch.bucketize(-log_snr.double(), -(falling[1:] + falling[:-1]) / 2)

    def posterior_log_variance(self, t: Tensor) -> Tensor:
        """log beta~_t, the variance of q(x_{t-1} | x_t, x0); at t = 0, where it is 0, beta~_1."""
        t = t.clamp(min=1)
        alpha_bar = self.alpha_bar.to(t.device)
        beta = self.betas.to(t.device)[t]
        return ((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta).log()


def spaced(T: int, steps: int | str | None) -> list[int]:
    """The kept timesteps of a chain of T, cleanest first (ADM's `timestep_respacing`).

    Raises:
        ValueError: `steps` is not understood, or cannot be had from T timesteps.
    """
    if steps is None:
        return list(range(T))
    n, integer_stride = _number(steps), str(steps).startswith("ddim")
    if n is None or not 1 <= n <= T:
        raise ValueError(
            f"steps = {steps!r} cannot be taken from {T} timesteps: "
            f"give a number from 1 to {T}, or ddimN"
        )
    if integer_stride:
        for stride in range(1, T + 1):
            if len(range(0, T, stride)) == n:
                return list(range(0, T, stride))
        raise ValueError(f"no integer stride takes {n} of {T} timesteps: give {n}, not ddim{n}")
    stride = (T - 1) / max(n - 1, 1)
    # Summed up and rounded half to even, as ADM does.
    return [round(at) for at in accumulate([0.0] + [stride] * (n - 1))]


def _number(steps: int | str | None) -> int | None:
    number = str(steps).removeprefix("ddim")
    return int(number) if number.isdecimal() else None


class ContinuousProcess(NoiseProcess, ABC):
    """A noising of data in continuous time, t float64 in (0, 1], by a stochastic equation.

    It is given by its log-SNR, because along every such equation g(t)^2 / sigma(t)^2 is minus the
    derivative of that: the density by which likelihood training draws t (arXiv 2106.05527).
    """

    T = 1000
    """Networks are told of t as of a chain of so many steps."""

    T_MIN = 1e-5
    """The cleanest t that is trained, as sigma goes to 0 there."""

    T_LAST = 1e-3
    """The cleanest t that a sampler visits; its last step goes from there to the data."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha^2 / sigma^2), float64 [B], decreasing in t."""

    def snr(self, t: Tensor) -> Tensor:
        return self.log_snr(t).exp()

    def progress(self, t: Tensor) -> Tensor:
        return t.double()

    def times(self, u: Tensor, interval: Interval) -> Tensor:
        lo = max(interval.lo, self.T_MIN)
        # lo itself belongs to the interval below, where there is one.
        first = math.nextafter(lo, 1) if interval.lo else lo
        return (lo + (interval.hi - lo) * u.double()).clamp(first, interval.hi)

    def visited(self, steps: int | str | None) -> Tensor:
        n = _number(steps)
        if n is None or n < 1:
            raise ValueError(
                f"steps = {steps!r} cannot be taken from {type(self).__name__}, which has no steps "
                "of its own: give a number"
            )
        return torch.linspace(1, self.T_LAST, n, dtype=torch.float64)

    def condition(self, t: Tensor) -> Tensor:
        """999 t (score_sde), so that networks for discrete chains fit."""
        return ((self.T - 1) * t).float()


class VPSDE(ContinuousProcess):
    """dx = -beta x / 2 dt + sqrt(beta) dw, beta linear in t (arXiv 2011.13456, eq. 11).

    With B(t) = beta_min t + (beta_max - beta_min) t^2 / 2, alpha^2 = exp(-B) = 1 - sigma^2.

    Args:
        beta_min: at t = 0.
        beta_max: at t = 1.

    Raises:
        ValueError: not 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__()
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"betas {beta_min:g} to {beta_max:g} must be positive and ascend")
        self.beta_min, self.beta_max = beta_min, beta_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        exponent = self._exponent(t)
        return (-exponent / 2).exp(), (-torch.expm1(-exponent)).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        exponent = self._exponent(t)
        return -exponent - (-torch.expm1(-exponent)).log()

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._at_exponent(functional.softplus(-log_snr.double()))

    def _exponent(self, t: Tensor) -> Tensor:
        t = t.double()
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t.square()

    def _at_exponent(self, exponent: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * exponent).sqrt()
        return 2 * exponent / (self.beta_min + root)


class SubVPSDE(VPSDE):
    """The VP equation with less noise: sigma = 1 - exp(-B) (arXiv 2011.13456, eq. 13).

    Args:
        beta_min: at t = 0.
        beta_max: at t = 1.

    Raises:
        ValueError: not 0 < beta_min <= beta_max.
    """

    preserves_variance = False

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        exponent = self._exponent(t)
        return (-exponent / 2).exp(), -torch.expm1(-exponent)

    def log_snr(self, t: Tensor) -> Tensor:
        exponent = self._exponent(t)
        return -exponent - 2 * (-torch.expm1(-exponent)).log()

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2)
        return self._at_exponent(2 * torch.asinh((-log_snr.double() / 2).exp() / 2))


class VESDE(ContinuousProcess):
    """x_t = x0 + sigma eps, sigma from sigma_min to sigma_max geometrically (arXiv 2011.13456).

    Args:
        sigma_min: at t = 0.
        sigma_max: at t = 1, about the largest distance of two data points.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    preserves_variance = False

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigmas {sigma_min:g} to {sigma_max:g} must be positive and ascend")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t.double()
        return torch.ones_like(sigma), sigma

    def log_snr(self, t: Tensor) -> Tensor:
        ratio = math.log(self.sigma_max / self.sigma_min)
        return -2 * (math.log(self.sigma_min) + ratio * t.double())

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        ratio = math.log(self.sigma_max / self.sigma_min)
        return (-log_snr.double() / 2 - math.log(self.sigma_min)) / ratio
