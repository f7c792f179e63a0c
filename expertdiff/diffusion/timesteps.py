"""Which timesteps a training batch draws."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import ContinuousProcess, DiscreteVP, NoiseProcess


@dataclass(frozen=True)
class Step:
    """The optimizer step that a draw is a part of.

    Attributes:
        shared: a generator that draws the same on all ranks and micro-batches of the step.
        part: which part of the step's whole batch is drawn, from 0.
        parts: in how many it is cut: ranks times micro-batches.
        run: the fraction of the run that lies behind, in [0, 1).
    """

    shared: torch.Generator
    part: int = 0
    parts: int = 1
    run: float = 0.0


class TimestepSampler(Described, nn.Module, ABC):
    """Draws t inside an interval, with the importance weight that its loss gets.

    A module, so that what a sampler learns is a buffer: checkpointed, and on the right device.
    """

    # A signature of its own: `describe` would write down nn.Module's *args and **kwargs.
    def __init__(self) -> None:
        super().__init__()

    def prepare(self, process: NoiseProcess, interval: Interval, stages: Partition) -> None:
        """Called once before training; the stages are those of the network.

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
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        """t [n] and weight [n] (float32), on the generators' device."""

    learns = False
    """Whether `update` is to be called."""

    bound = False
    """Whether it draws from the interval it was prepared for, whatever it is asked for."""

    paced = False
    """Whether draws depend on `Step.run`, so that another length of the run is another run."""

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
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=generator, device=generator.device)
        return process.times(u, interval), torch.ones(n, device=generator.device)


class OneForAll(Uniform):
    """One uniform t for all items of a micro-batch; another for each rank and seed."""

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        t, weight = super().sample(1, interval, generator, process, step)
        return t.repeat(n), weight.repeat(n)


class UniformLogSNR(TimestepSampler):
    """Every log-SNR of the interval alike."""

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        device = generator.device
        u = torch.rand(n, generator=generator, device=device)
        # Not a tensor of the host, which would wait for the GPU.
        ends = process.times(torch.linspace(0, 1 - 2**-24, 2, device=device), interval)
        first, last = process.snr(ends).log()
        # Rounding must not hand a t to the neighbour.
        t = process.at_log_snr(first + u * (last - first)).clamp(*ends.aminmax())
        return t, torch.ones(n, device=device)


class LowDiscrepancy(TimestepSampler):
    """t_i = (u + i / N) mod 1 of the interval, i = 0..N-1 (arXiv 2107.00630).

    One u a step, and N the items of all its ranks and micro-batches: every t is as uniform as by
    `Uniform`, but a step has one in each N-th of the interval, so that its loss varies less. A part
    of the step takes every `parts`-th of them.
    """

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        device = generator.device
        u = torch.rand((), generator=step.shared, device=device, dtype=torch.float64)
        i = step.part + step.parts * torch.arange(n, device=device, dtype=torch.float64)
        return process.times((u + i / (n * step.parts)) % 1, interval), torch.ones(n, device=device)


class CLTS(TimestepSampler):
    """A curriculum from all t alike to those around mu (CLTS, arXiv 2404.07946), RECONSTRUCTED.

    p(t) = (1 - g) / T + g q(t) with q normal in progress, cut off at the ends of the chain, and g
    rising linearly with the run from 0 to `g_end`; an expert has the part of p in its interval. The
    weight is 1, as the objective is meant to change. The paper's formula was not at hand: it says
    mu and that easy t are drawn less and less often, all else is ours.

    Args:
        mu: the progress where q is largest (the paper's).
        s: standard deviation of q (ours).
        g_end: g at the end of the run, in [0, 1] (ours); with 0 this is `Uniform`, bit for bit.
        as_weight: draw all t alike and let p(t) be their weight: the control, of equal expectation.

    Raises:
        ValueError: out of range.
    """

    paced = True

    def __init__(
        self, mu: float = 0.3, s: float = 0.25, g_end: float = 1.0, as_weight: bool = False
    ) -> None:
        super().__init__()
        if not (0 <= mu <= 1 and s > 0 and 0 <= g_end <= 1):
            raise ValueError(f"mu {mu} and g_end {g_end} must be in [0, 1], and s {s} positive")
        self.mu, self.s, self.g_end, self.as_weight = mu, s, g_end, as_weight

    def probabilities(
        self, g: float, interval: Interval, process: NoiseProcess, device: torch.device
    ) -> Tensor:
        """Of the t of the interval, or of so many equal parts of it in continuous time; float64.

        In logarithms, because q may be smaller than any number where an expert lives.
        """
        whole, log_q = (self._log_q(i, process, device) for i in (Interval(), interval))
        uniform = (math.log1p(-g) if g < 1 else -math.inf) - math.log(process.T)
        curriculum = math.log(g) + log_q - whole.logsumexp(0)
        return torch.logaddexp(torch.full_like(log_q, uniform), curriculum).softmax(0)

    def _log_q(self, interval: Interval, process: NoiseProcess, device: torch.device) -> Tensor:
        n = max(1, len(interval.steps(process.T)))
        middle = (torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n
        z = (process.progress(process.times(middle, interval)) - self.mu) / self.s
        return -z.square() / 2

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        g, device = self.g_end * step.run, generator.device
        u, weight = torch.rand(n, generator=generator, device=device), torch.ones(n, device=device)
        if g > 0:
            p = self.probabilities(g, interval, process, device)
            if self.as_weight:
                weight = (len(p) * p[(u.double() * len(p)).long()]).float()
            else:
                part = torch.multinomial(p, n, replacement=True, generator=generator)
                u = (part + u.double()) / len(p)
        return process.times(u, interval), weight


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
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        u, chosen = torch.rand(2, n, generator=generator, device=generator.device)
        u = torch.where(chosen < self.share, self.into * u, u)
        return process.times(u, interval), torch.ones(n, device=generator.device)


class Staged(TimestepSampler):
    """Each batch has t of every stage, in fixed shares, as decoders in parallel processes need.

    Of n draws each stage gets n p rounded up or down, by chance such that n p is the mean; inside
    a stage every t alike. Which draws these are is random, too. Weights are 1: the shares are
    meant to change the objective. The stages are the intervals of the network's partition, or of
    the model's where the network has none; inside an expert, what lies in its interval of each.

    Args:
        stage_probs: ``uniform``, ``proportional`` to length, or the probability of each stage.

    Raises:
        ValueError: probabilities that are not positive or do not sum to 1; on preparation, not one
            a stage; on a draw, too few for each stage to have one.
    """

    bound = True
    ends: Tensor

    def __init__(
        self, stage_probs: Literal["uniform", "proportional"] | Sequence[float] = "uniform"
    ) -> None:
        super().__init__()
        self.stage_probs = stage_probs
        if not isinstance(stage_probs, str) and not (
            stage_probs and min(stage_probs) > 0 and math.isclose(sum(stage_probs), 1)
        ):
            raise ValueError(
                f"stage_probs {list(stage_probs)} must be positive and sum to 1: a stage that is "
                "never drawn would never be trained"
            )

    def prepare(self, process: NoiseProcess, interval: Interval, stages: Partition) -> None:
        lengths = [stage.hi - stage.lo for stage in stages.intervals()]
        named = {"uniform": [1 / len(stages)] * len(stages), "proportional": lengths}
        probs = named[self.stage_probs] if isinstance(self.stage_probs, str) else self.stage_probs
        if len(probs) != len(stages):
            raise ValueError(
                f"stage_probs {list(probs)} are of {len(probs)} stages, but {stages} has "
                f"{len(stages)}: give one a stage"
            )
        self.parts, shares = [], []
        for stage, length, p in zip(stages.intervals(), lengths, probs):
            part = Interval(max(stage.lo, interval.lo), min(stage.hi, interval.hi))
            if part.lo < part.hi:
                self.parts.append(part)
                shares.append(p * (part.hi - part.lo) / length)
        self.shares = [share / sum(shares) for share in shares]
        ends = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)[:-1]
        self.register_buffer("ends", ends, persistent=False)

    def sample(
        self,
        n: int,
        interval: Interval,
        generator: torch.Generator,
        process: NoiseProcess,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        if n * min(self.shares) < 1 - 1e-9:
            raise ValueError(
                f"{n} draws leave none for a stage of probability {min(self.shares):g}: use "
                f"batches of {math.ceil(1 / min(self.shares) - 1e-9)} or more"
            )
        device = generator.device
        u, jitter = torch.rand(2, n, generator=generator, device=device, dtype=torch.float64)
        order = torch.randperm(n, generator=generator, device=device)
        # One offset for all: every stretch of length p holds n p of these points, rounded.
        stage = torch.bucketize((order + jitter[0]) / n, self.ends, right=True)
        t = torch.stack([process.times(u, part) for part in self.parts])
        return t.gather(0, stage[None])[0], torch.ones(n, device=device)


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

    learns = bound = True
    losses: Tensor
    told: Tensor

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        if history < 1 or not 0 < uniform <= 1:
            raise ValueError(
                f"history {history} must be 1 or more, and uniform {uniform} in (0, 1]"
            )
        self.history, self.uniform = history, uniform

    def prepare(self, process: NoiseProcess, interval: Interval, stages: Partition) -> None:
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
        step: Step,
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

    def prepare(self, process: NoiseProcess, interval: Interval, stages: Partition) -> None:
        if not isinstance(process, ContinuousProcess):
            raise ValueError(
                f"{type(self).__name__} needs a process in continuous time, not "
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
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        device, t_min = generator.device, process.T_MIN
        lo, hi = (
            torch.full((), t, dtype=torch.float64, device=device)
            for t in (max(interval.lo, t_min), interval.hi)
        )
        reachable = self.below(hi, t_min)
        u = torch.rand((), generator=step.shared, device=device, dtype=torch.float64)
        lo = torch.maximum(self.quantile(u * reachable, t_min), lo)
        # Along -log SNR the density g^2 / sigma^2 is constant.
        first, last = (-process.log_snr(t) for t in (lo, hi))
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        t = process.at_log_snr(-(first + (1 - u) * (last - first)))
        weight = reachable * (last - first) / 2
        # Rounding must not hand a t to the neighbour.
        return t.clamp(torch.nextafter(lo, hi), hi), weight.float().expand(n)


class Likelihood(SoftTruncation):
    """Likelihood training (arXiv 2101.09258): `SoftTruncation` of k = infinity, which has no m.

    With the loss of eps and no weighting, the mean over the whole chain is the score's part of an
    upper bound of the negative log-likelihood, in nats a dimension; its constant is in `INDM`.

    Raises:
        ValueError: on preparation, a process that is not continuous.
    """

    def __init__(self) -> None:
        super().__init__(math.inf)
