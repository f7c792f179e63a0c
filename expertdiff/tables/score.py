"""What is measured of a trained model of the plane, and of the floors beside it."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from expertdiff.data.base import Split, other
from expertdiff.data.densities import Density
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.exact import ExactDenoiser
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import SampleNoise, Sampler
from expertdiff.evaluation.cloud import PointCloud
from expertdiff.evaluation.likelihood import log_likelihood
from expertdiff.evaluation.points import mode_coverage, save_points
from expertdiff.seeds import generator

POINTS = 100_000
"""Real points that samples are compared with, and that the evaluation loss is taken on."""
SAMPLES = 10_000
"""Drawn for each score."""
BATCH = 2500
"""Samples drawn at a time: on a CPU a fifth faster than all, whose activations leave the cache."""
LIKELIHOODS = 500
"""Validation points whose likelihood is taken: it needs the Jacobian at every timestep."""


def check_fresh(name: str, density: Density, reference: Split, parts: int) -> None:
    """Raises a ValueError unless a set has points for so many parts of `Bench.fresh`.

    The last part may have fewer, down to a tenth.
    """
    split, needed = other(reference), (parts - 1) * SAMPLES + SAMPLES // 10
    if (found := len(density.points(split, needed))) < needed:
        raise ValueError(
            f"set {name} has {found:,} {split} points, and {parts} seeds of fresh ones take "
            f"{needed:,} or more: give more points or fewer seeds, or another reference than "
            f"{reference}"
        )


@dataclass
class Bench:
    """Everything that the models of one set under one schedule are measured with.

    Args:
        density: what is learnt.
        process: the noise process.
        sampler: how samples are drawn.
        reference: the split that they are compared with.
        bf16: run networks in bfloat16, as they were trained.
    """

    density: Density
    process: NoiseProcess
    sampler: Sampler
    reference: Split
    bf16: bool

    def __post_init__(self) -> None:
        self.device = default_device()
        self.real = self._points(self.reference)
        self.held_out = self._points("validation").float()
        self._judge = PointCloud()
        mixture = self.density.mixture()
        self.exact = None
        # Points without a width are known by heart: with held-out ones a network comes below that.
        if mixture is not None and mixture.std.any():
            self.exact = ExactDenoiser(mixture, self.process).to(self.device)

    def _points(self, split: Split) -> Tensor:
        return torch.from_numpy(self.density.points(split, POINTS))

    @cached_property
    def least(self) -> float:
        """The loss of the exact denoiser, which no network can go below."""
        return self.loss(self.exact)

    @torch.no_grad()
    def model(self, denoiser: Denoiser, seed: int, folder: Path) -> dict[str, float]:
        """All scores of a network, and its samples in `folder`."""
        denoiser = denoiser.to(self.device)
        scores = self.drawn(denoiser, seed, folder)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            scores["loss"] = self.loss(denoiser)
        if self.exact is not None:
            scores["excess"] = scores["loss"] - self.least
        held_out = self.held_out[:LIKELIHOODS].to(self.device)
        return scores | {"NLL": -log_likelihood(denoiser, held_out).mean().item()}

    @torch.no_grad()
    def drawn(self, denoiser: Denoiser, seed: int, folder: Path) -> dict[str, float]:
        """The scores of what a denoiser draws."""
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [
                self.sampler(denoiser, SampleNoise(seed, index.tolist(), (2,), self.device)).cpu()
                for index in torch.arange(SAMPLES).split(BATCH)
            ]
        samples = torch.cat(parts)
        return {"sampling": time.perf_counter() - began} | self.points(samples, folder)

    def fresh(self, part: int, folder: Path) -> dict[str, float]:
        """The scores of real points of the other split: the `part`-th 10,000 of them."""
        points = self._points(other(self.reference))
        return self.points(points[part * SAMPLES : (part + 1) * SAMPLES], folder)

    def points(self, samples: Tensor, folder: Path) -> dict[str, float]:
        """The scores of samples, which are kept in `folder`."""
        save_points(samples, folder / "samples.csv")
        summary = self._judge.summary
        scores = self._judge.distances(summary(samples), summary(self.real))
        modes = self.density.modes()
        return scores | (mode_coverage(samples, modes) if modes is not None else {})

    def loss(self, denoiser: Denoiser) -> float:
        """mean |eps_hat - eps|^2 over held-out points, at the same t and noise for every model."""
        total = 0.0
        for i, x0 in enumerate(self.held_out.split(SAMPLES)):
            random = generator("cpu", "evaluation loss", i)
            t = self.process.times(torch.rand(len(x0), generator=random), Interval())
            eps = torch.randn(x0.shape, generator=random)
            x_t = self.process.add_noise(x0, eps, t)
            said = denoiser(x_t.to(self.device), t).eps.cpu()
            total += (said - eps).square().mean(1).sum().item()
        return total / len(self.held_out)
