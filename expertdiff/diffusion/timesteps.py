"""Which timesteps a training batch draws."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import ContinuousProcess, DiscreteVP, NoiseProcess


class TimestepSampler(Described, nn.Module, ABC):
    """Draws t inside an interval, with the importance weight that its loss gets.

    A module, so that what a sampler learns is a buffer: checkpointed, and on the right device.
    """

    # A signature of its own: `describe` would write down nn.Module's *args and **kwargs.
    def __init__(self) -> None:
        super().__init__()

    def prepare(self, process: NoiseProcess, interval: Interval) -> None:
        """Called once before training.

        Raises:
            ValueError: this process or interval cannot be sampled so.
        """

    @abstractmethod
    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """t [n] and weight [n] (float32), on the generators' device.

        `shared` draws the same on all ranks and micro-batches of an optimizer step.
        """

    learns = False
    """Whether `update` is to be called."""

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Told t [B] and losses [B] of a step, of all ranks."""


class Uniform(TimestepSampler):
    """Every t of the interval alike."""

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=generator, device=generator.device)
        return process.times(u, interval), torch.ones(n, device=generator.device)


class UniformLogSNR(TimestepSampler):
    """Every log-SNR of the interval alike."""

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=generator, device=generator.device)
        return self.at(u, interval, process), torch.ones(n, device=generator.device)

    def at(self, u: Tensor, interval: Interval, process: NoiseProcess) -> Tensor:
        """The t [n] at fractions u [n] in [0, 1) of the interval's log-SNR, cleanest first."""
        ends = process.times(torch.tensor([0, 1 - 2**-24], device=u.device), interval)
        first, last = process.snr(ends).log()
        # Rounding must not hand a t to the neighbour.
        return process.at_log_snr(first + u * (last - first)).clamp(*ends.aminmax())


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
        super().__init__()
        if not (0 <= share <= 1 and 0 < into <= 1):
            raise ValueError(f"share {share} must be in [0, 1] and into {into} in (0, 1]")
        self.share, self.into = share, into

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        u, chosen = torch.rand(2, n, generator=generator, device=generator.device)
        u = torch.where(chosen < self.share, self.into * u, u)
        return process.times(u, interval), torch.ones(n, device=generator.device)


class LossSecondMoment(TimestepSampler):
    """t in proportion to the root of its mean squared loss (arXiv 2102.09672, section 3.3).

    Uniform until every t of the interval has been told `history` losses; the weight keeps the
    expected loss that of uniform t.

    Args:
        history: how many of the last losses of each t count.
        uniform: the share of draws that are uniform for ever.

    Raises:
        ValueError: out of range; on preparation, a process without integer timesteps.
    """

    learns = True
    losses: Tensor
    told: Tensor

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        if history < 1 or not 0 < uniform <= 1:
            raise ValueError(
                f"history {history} must be 1 or more, and uniform {uniform} in (0, 1]"
            )
        self.history, self.uniform = history, uniform

    def prepare(self, process: NoiseProcess, interval: Interval) -> None:
        if not isinstance(process, DiscreteVP):
            raise ValueError(
                f"LossSecondMoment needs a process with timesteps, not {type(process).__name__}: "
                "in continuous time draw by SoftTruncation"
            )
        if not (steps := interval.steps(process.T)):
            raise ValueError(
                f"interval {interval} holds none of the {process.T} timesteps: use fewer experts"
            )
        self.first = steps.start
        self.register_buffer("losses", torch.zeros(len(steps), self.history))
        self.register_buffer("told", torch.zeros(len(steps), dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """The probability of each t of the interval, float64."""
        uniform = torch.full_like(self.told, 1, dtype=torch.float64) / len(self.told)
        size = self.losses.double().square().mean(1).sqrt()
        learned = (1 - self.uniform) * size / size.sum() + self.uniform * uniform
        # No branch: asking would wait for the GPU in every step.
        return torch.where((self.told >= self.history).all() & (size.sum() > 0), learned, uniform)

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        i = torch.multinomial(p, n, replacement=True, generator=generator)
        return self.first + i, (1 / (len(p) * p[i])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        order = t.argsort(stable=True)
        i, loss = (t - self.first)[order], loss[order].to(self.losses.dtype)
        # Not bincount, which would wait for the GPU.
        count = torch.zeros_like(self.told).index_add_(0, i, torch.ones_like(i))
        # Of equal t in a batch, the n-th goes n places further in the ring of its t.
        nth = torch.arange(len(i), device=i.device) - (count.cumsum(0) - count)[i]
        kept = nth >= count[i] - self.history  # a ring holds only the last
        place = i * self.history + (self.told[i] + nth) % self.history
        # Others go to a place behind all rings: leaving them out would wait for the GPU.
        rings = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        rings[torch.where(kept, place, len(rings) - 1)] = loss
        self.losses.copy_(rings[:-1].view_as(self.losses))
        self.told += count


class SoftTruncation(TimestepSampler):
    """Likelihood training above a random truncation time (arXiv 2106.05527).

    Each optimizer step draws one m in [t_min, 1] of density proportional to m^-k, given that it
    lies below the interval's end; then every t of the step's batch in [max(m, lo), hi] of density
    proportional to g^2 / sigma^2. The weight leaves each t the expected weight that it has in a
    single model of the whole chain, so the experts' losses add up to that model's.

    Args:
        k: larger is closer to no truncation at all; 1 for ImageNet-32.

    Raises:
        ValueError: k <= 0; on preparation, a process that is not continuous.
    """

    def __init__(self, k: float = 1.0) -> None:
        super().__init__()
        if k <= 0:
            raise ValueError(f"k {k} must be positive")
        self.k = k

    def prepare(self, process: NoiseProcess, interval: Interval) -> None:
        if not isinstance(process, ContinuousProcess):
            raise ValueError(
                f"SoftTruncation needs a process in continuous time, not "
                f"{type(process).__name__}: choose VPSDE, SubVPSDE or VESDE"
            )

    def below(self, t: Tensor, t_min: float) -> Tensor:
        """F(t), the probability that m <= t, of t [B] in [t_min, 1]."""
        if self.k == 1:
            return (t / t_min).log() / -math.log(t_min)
        a = self.k - 1
        return torch.expm1(a * (t_min / t).log()) / math.expm1(a * math.log(t_min))

    def quantile(self, u: Tensor, t_min: float) -> Tensor:
        """The m with F(m) = u."""
        if self.k == 1:
            return t_min ** (1 - u)
        a = self.k - 1
        return t_min * (1 + u * math.expm1(a * math.log(t_min))) ** (-1 / a)

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        shared: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        device, t_min = generator.device, process.T_MIN
        lo, hi = (
            torch.full((), t, dtype=torch.float64, device=device)
            for t in (max(interval.lo, t_min), interval.hi)
        )
        reachable = self.below(hi, t_min)
        u = torch.rand((), generator=shared, device=device, dtype=torch.float64)
        lo = torch.maximum(self.quantile(u * reachable, t_min), lo)
        # Along -log SNR the density g^2 / sigma^2 is constant.
        first, last = (-process.log_snr(t) for t in (lo, hi))
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        t = process.at_log_snr(-(first + (1 - u) * (last - first)))
        weight = reachable * (last - first) / 2
        # Rounding must not hand a t to the neighbour.
        return t.clamp(torch.nextafter(lo, hi), hi), weight.float().expand(n)
