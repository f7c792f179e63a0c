"""Samplers: one loop, one `step` formula each.

Notation of a step from t to the next, cleaner s: a, sigma at t; a_s, sigma_s at s. The last step
goes to data: a_s = 1, sigma_s = 0.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertdiff.describe import Described
from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.objective import learned_log_variance
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.seeds import seed_of


class SampleNoise:
    """The random numbers of a batch of samples: each a function of (seed, sample index, step).

    So an image depends on its seed and index alone, not on the batch, the device or the number of
    processes it was drawn with.

    Args:
        seed: the sampling seed.
        index: the sample indices of this batch.
        shape: of one sample.
        device: where the noise goes; it is always drawn on the CPU.
    """

    def __init__(
        self, seed: int, index: Sequence[int], shape: Sequence[int], device: torch.device | str
    ) -> None:
        self.seed, self.index, self.shape, self.device = seed, index, tuple(shape), device

    def __call__(self, step: int) -> Tensor:
        """Standard normal [B, *shape]; step 0 is the start of the chain."""
        size = math.prod(self.shape)
        blocks = -(-size // 4)  # Philox makes four words at a time, and starts at any four
        key, index = seed_of(self.seed, "sample", step), np.asarray(self.index)
        first, span = index.min(), np.ptp(index) + 1
        if span < 8 * len(index):  # one call, even if some are thrown away
            words = np.random.Philox(key=key, counter=first * blocks).random_raw(4 * blocks * span)
            words = words.reshape(span, -1)[index - first]
        else:
            streams = (np.random.Philox(key=key, counter=i * blocks) for i in index)
            words = np.stack([stream.random_raw(4 * blocks) for stream in streams])
        normal = torch.from_numpy(_normal(words)[:, :size]).float()
        return normal.reshape(-1, *self.shape).to(self.device, non_blocking=True)


def _normal(words: np.ndarray) -> np.ndarray:
    """Standard normal numbers, float64, of as many random 64-bit words (Box and Muller 1958)."""
    radius, angle = ((words >> 11) + 0.5).reshape(len(words), 2, -1).swapaxes(0, 1) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


class Step(NamedTuple):
    """Coefficients of one step, floats: alpha and sigma at t, and at the next point s."""

    alpha: float
    sigma: float
    alpha_s: float
    sigma_s: float

    @property
    def tau(self) -> float:
        """1 - (alpha sigma_s / (alpha_s sigma))^2: an ancestral step's share of fresh noise."""
        return 1 - (self.alpha * self.sigma_s / (self.alpha_s * self.sigma)) ** 2


class Moment(NamedTuple):
    """All that a step from t to s may use.

    Attributes:
        x_t: [B, ...].
        now: the prediction at t.
        step: the coefficients of this step.
        before: the prediction one step earlier; ``None`` at the first, and for a sampler that
            looks at one step only.
        last: the coefficients of that earlier step.
        crossed: whether that earlier step was another expert's.
        noise: draws standard normal [B, ...]; a deterministic step does not call it.
        ahead: the prediction at s for an x_s [B, ...]; one more network call.
    """

    x_t: Tensor
    now: Prediction
    step: Step
    before: Prediction | None
    last: Step | None
    crossed: bool
    noise: Callable[[], Tensor]
    ahead: Callable[[Tensor], Prediction]


class State(NamedTuple):
    """Where a trajectory stands; enough to go on from there.

    Attributes:
        k: the number of steps taken.
        t: of the chain; -1 at its end.
        x_t: [B, ...]; the samples at its end.
        before: the prediction one step earlier, where the sampler looks at it.
    """

    k: int
    t: float
    x_t: Tensor
    before: Prediction | None


class Sampler(Described, ABC):
    """From noise to data with any denoiser; deterministic in (seed, index).

    Args:
        steps: of the chain: ``"ddim50"`` (ADM's integer stride: 0, 20, .., 980), ``50`` (ADM's
            rounded fractional stride: 0, 20, 41, .., 999), ``None`` for every timestep; in
            continuous time both are 50 equal steps from 1 to 0.001.
        clip: clip the predicted x0 to [-1, 1], as images are; false for other data.
    """

    multistep = False
    """Whether a step looks at the prediction of the step before."""

    looks_ahead = False
    """Whether a step asks for the prediction at its end, which another expert may own."""

    def __init__(self, steps: int | str | None = None, clip: bool = True) -> None:
        self.steps, self.clip = steps, clip

    @abstractmethod
    def step(self, m: Moment) -> Tensor:
        """x_s from x_t."""

    def visited(self, process: NoiseProcess) -> Tensor:
        """The t of the chain's points, noisiest first.

        Raises:
            ValueError: this process has no such steps.
        """
        return process.visited(self.steps)

    def calls(self, process: NoiseProcess) -> Tensor:
        """The t of each network call, noisiest first."""
        return self.visited(process)

    @torch.no_grad()
    def trajectory(
        self,
        denoiser: Denoiser,
        noise: SampleNoise,
        y: Tensor | None = None,
        start: State | None = None,
    ) -> Iterator[State]:
        """The states of the chain, each before its network call; the last has the samples.

        Args:
            denoiser: the model.
            noise: of this batch.
            y: labels [B].
            start: a state of this trajectory to go on from, with this or another denoiser.
        """
        process = denoiser.process
        visited = self.visited(process)
        alpha, sigma = (c.tolist() for c in process.alpha_sigma(visited))
        grid = list(zip([*alpha, 1.0], [*sigma, 0.0]))
        steps = [Step(*here, *there) for here, there in zip(grid, grid[1:])]
        owners = denoiser.partition.index(process.progress(visited)).tolist()

        def predict(x: Tensor, k: int, denoiser: Denoiser) -> Prediction:
            prediction = denoiser(x, visited[k].repeat(len(x)), y)
            if not self.clip:
                return prediction
            x0 = prediction.x0.clamp(-1, 1)
            # eps must follow the clipped x0, or the step would leave the line between them.
            return replace(prediction, x0=x0, eps=(x - steps[k].alpha * x0) / steps[k].sigma)

        first = start.k if start else 0
        x = start.x_t if start else process.prior_std * noise(0)
        before = start.before if start else None
        for k in range(first, len(steps)):
            yield State(k, visited[k].item(), x, before)
            now = predict(x, k, denoiser)
            moment = Moment(
                x_t=x,
                now=now,
                step=steps[k],
                before=before,
                last=steps[k - 1] if k else None,
                crossed=k > 0 and owners[k] != owners[k - 1],
                noise=lambda k=k: noise(k + 1),
                ahead=lambda x_s, k=k: predict(x_s, k + 1, denoiser.ahead),
            )
            x, before = self.step(moment), now if self.multistep else None
            if steps[k].sigma_s == 0:
                x = denoiser.to_data(x)
        yield State(len(steps), -1, x, before)

    def __call__(self, denoiser: Denoiser, noise: SampleNoise, y: Tensor | None = None) -> Tensor:
        """Samples [B, ...]: data in [-1, 1], where x0 is clipped."""
        (last,) = deque(self.trajectory(denoiser, noise, y), maxlen=1)
        return last.x_t


class DDIM(Sampler):
    """arXiv 2010.02502, eq. 12.

    Args:
        steps: see `Sampler`.
        eta: 0 is deterministic, 1 has the noise of DDPM with the posterior variance.
        clip: see `Sampler`.
    """

    def __init__(
        self, steps: int | str | None = "ddim50", eta: float = 0.0, clip: bool = True
    ) -> None:
        super().__init__(steps, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} must be in [0, 1]: 0 draws no noise, 1 as much as DDPM")
        self.eta = eta

    def step(self, m: Moment) -> Tensor:
        s, now = m.step, m.now
        fresh = self.eta * s.sigma_s * math.sqrt(s.tau)
        x_s = s.alpha_s * now.x0 + math.sqrt(s.sigma_s**2 - fresh**2) * now.eps
        return x_s + fresh * m.noise() if fresh else x_s


class DDPM(Sampler):
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), with the learned variance if any.

    Args:
        steps: see `Sampler`.
        large_variance: without a learned variance, beta instead of the posterior's beta~ (ADM's
            default; better for many steps of an eps network, worse for few).
        clip: see `Sampler`.
    """

    def __init__(
        self, steps: int | str | None = None, large_variance: bool = False, clip: bool = True
    ) -> None:
        super().__init__(steps, clip)
        self.large_variance = large_variance

    def step(self, m: Moment) -> Tensor:
        s, now = m.step, m.now
        if s.sigma_s == 0:
            return now.x0
        mean = s.alpha_s * now.x0 + s.sigma_s * math.sqrt(1 - s.tau) * now.eps
        ratio, posterior = s.alpha / s.alpha_s, s.sigma_s**2 * s.tau
        beta = s.sigma**2 - (ratio * s.sigma_s) ** 2  # 1 - ratio^2 where variance is preserved
        if now.variance is not None:
            log_variance = learned_log_variance(now, math.log(beta), math.log(posterior))
            return mean + (0.5 * log_variance).exp() * m.noise()
        return mean + math.sqrt(beta if self.large_variance else posterior) * m.noise()


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order at both ends of the chain.

    Args:
        steps: see `Sampler`.
        clip: see `Sampler`.
        restart: take a first-order step where another expert takes over, instead of extrapolating
            from the prediction of the last one.
    """

    multistep = True

    def __init__(
        self, steps: int | str | None = 20, clip: bool = True, restart: bool = False
    ) -> None:
        super().__init__(steps, clip)
        self.restart = restart

    def step(self, m: Moment) -> Tensor:
        s, now = m.step, m.now
        if s.sigma_s == 0:
            return now.x0
        h = math.log(s.alpha_s / s.sigma_s) - math.log(s.alpha / s.sigma)
        x0 = now.x0
        if m.before is not None and not (self.restart and m.crossed):
            r = (math.log(s.alpha / s.sigma) - math.log(m.last.alpha / m.last.sigma)) / h
            x0 = x0 + (x0 - m.before.x0) / (2 * r)
        return s.sigma_s / s.sigma * m.x_t - s.alpha_s * math.expm1(-h) * x0


class Heun(Sampler):
    """Heun's method on the probability flow (arXiv 2206.00364, algorithm 1, without churn).

    Near the data it follows d (x_t / alpha) / d (sigma / alpha) = eps; near the noise, where
    sigma / alpha of a cosine chain jumps from thousands to tens and would multiply any error of
    eps, d (x_t / sigma) / d (alpha / sigma) = x0, which is the same flow. Two network calls a step
    but the last; each is the owner's of its own t.

    Args:
        steps: see `Sampler`.
        clip: see `Sampler`.
    """

    looks_ahead = True

    def __init__(self, steps: int | str | None = 18, clip: bool = True) -> None:
        super().__init__(steps, clip)

    def calls(self, process: NoiseProcess) -> Tensor:
        visited = super().calls(process)
        return torch.cat([visited[:1], visited[1:].repeat_interleave(2)])

    def step(self, m: Moment) -> Tensor:
        s, now = m.step, m.now
        if s.sigma_s == 0:
            return now.x0
        ahead = m.ahead(s.alpha_s * now.x0 + s.sigma_s * now.eps)
        if s.alpha_s < s.sigma_s:
            width = s.alpha_s / s.sigma_s - s.alpha / s.sigma
            return s.sigma_s * (m.x_t / s.sigma + width / 2 * (now.x0 + ahead.x0))
        width = s.sigma_s / s.alpha_s - s.sigma / s.alpha
        return s.alpha_s * (m.x_t / s.alpha + width / 2 * (now.eps + ahead.eps))


class CAS(Sampler):
    """Consistent annealed sampling (arXiv 2009.05475), in x_t / alpha, for any process.

    The points of the chain have sigma / alpha in geometric progression, each gamma times the one
    before. A step leaves 1 - eta of the noise that the network finds, and adds as much fresh noise
    as the level of the next point lacks:

        x_s / alpha_s = x0 + (1 - eta) sigma / alpha eps
                        + sigma_s / alpha_s sqrt(1 - ((1 - eta) / gamma)^2) z

    As gamma is constant, this is DDIM of a constant eta of its own, on these points: it draws no
    noise at 1 - gamma, as much as DDPM at 1 - gamma^2, and more beyond. Where the data are wide, an
    eta far above that draws too narrow samples: steps have to be small.

    Args:
        steps: how many points, 2 or more; of a chain of timesteps the nearest ones, each once.
        eta: the paper's step size over its least sigma squared, in (1 - gamma, 1 + gamma); by
            default 1 - gamma^2.
        clip: see `Sampler`.

    Raises:
        ValueError: fewer than 2 steps. Later: eta is out of its range for these steps.
    """

    def __init__(self, steps: int = 50, eta: float | None = None, clip: bool = True) -> None:
        super().__init__(steps, clip)
        if steps < 2:
            raise ValueError(f"steps {steps} make no geometric progression: give 2 or more")
        self.eta = eta

    def visited(self, process: NoiseProcess) -> Tensor:
        ends = process.visited(2)
        first, last = process.snr(ends).log().tolist()
        gamma = math.exp((first - last) / (2 * (self.steps - 1)))
        if self.eta is not None and not abs(1 - self.eta) < gamma:
            raise ValueError(
                f"eta {self.eta} must be in ({1 - gamma:.3g}, {1 + gamma:.3g}) with {self.steps} "
                "steps of this process: choose one there, or another number of steps"
            )
        levels = torch.linspace(first, last, self.steps, dtype=torch.float64)
        return process.at_log_snr(levels).clamp(*ends.aminmax()).unique_consecutive()

    def step(self, m: Moment) -> Tensor:
        s, now = m.step, m.now
        if s.sigma_s == 0:
            return now.x0
        gamma = s.alpha * s.sigma_s / (s.alpha_s * s.sigma)
        kept = gamma if self.eta is None else (1 - self.eta) / gamma
        kept = max(-1.0, min(1.0, kept))  # the nearest timesteps may lie closer than their share
        x_s = s.alpha_s * now.x0 + s.sigma_s * kept * now.eps
        return x_s + s.sigma_s * math.sqrt(1 - kept**2) * m.noise()
