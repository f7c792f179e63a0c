"""The log-likelihood of data under a denoiser's probability flow."""

import math

import torch
from torch import Tensor

from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import ContinuousProcess, DiscreteVP
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.image_files import check_images
from expertdiff.seeds import generator

GRID = 200
"""Points of the integral in continuous time, before each border between experts adds one."""


@torch.inference_mode(False)  # inside it no gradient can be had
@torch.no_grad()
def log_likelihood(denoiser: Denoiser, x: Tensor, probe: Tensor | None = None) -> Tensor:
    """The log-density in bits, float64 [B], of items x [B, ...] under the probability flow.

    `x`, or what a `Denoiser.flow` makes of it, is taken to be x_t at the cleanest t, so the density
    is that of the marginal there: of alpha x0 + sigma eps, which is the data slightly blurred.

    In xbar = x_t / alpha and s = sigma / alpha the flow is d xbar / ds = eps(x_t, t), and along it
    d log p(xbar) / d ln s = -sigma div eps(x_t, t) (arXiv 2011.13456, equation 39). Heun's method
    takes xbar to the noisiest t, where x_t is normal as the sampler's start is; the divergence is
    integrated over ln s by the trapezoidal rule, where it goes to D smoothly while s of the last
    step may grow thirtyfold. A chain is followed step by step; in continuous time the points lie
    evenly in ln s, and a border between experts has one on each side, because eps jumps there.
    All that is inexact is the grid: it shows in hundredths of a bit where modes are as narrow as
    the first sigma, and hardly elsewhere.

    Args:
        denoiser: in float32.
        x: [B, D] for the exact divergence, by D backward passes a point; any shape with a probe.
        probe: [B, ...] of independent signs, -1 or 1: estimates the divergence by one backward
            pass a point, without bias (Hutchinson 1989; arXiv 1810.01367).

    Raises:
        ValueError: another noise process, or another shape.
    """
    process = denoiser.process
    if x.ndim != 2 and probe is None:
        raise ValueError(f"points of shape {list(x.shape)} given: [B, D] is needed, or a probe")
    times = _times(denoiser)
    alpha, sigma = process.alpha_sigma(times)
    s, last = (sigma / alpha).tolist(), len(times) - 1
    z, log_det = denoiser.from_data(x)
    xbar, slopes = z.double() / alpha[0], []
    for k, t in enumerate(times):
        eps, divergence = _eps_and_divergence(denoiser, alpha[k] * xbar, t, probe)
        slopes.append(sigma[k] * divergence)
        if k < last:
            ahead = alpha[k + 1] * (xbar + (s[k + 1] - s[k]) * eps)
            xbar = xbar + (s[k + 1] - s[k]) / 2 * (eps + _eps(denoiser, ahead, times[k + 1]))

    gained = torch.trapezoid(torch.stack(slopes), (sigma / alpha).log().to(x.device), dim=0)
    end = alpha[-1] * xbar / process.prior_std
    prior = -0.5 * (end.square() + math.log(2 * math.pi * process.prior_std**2)).flatten(1).sum(1)
    scaling = x[0].numel() * (alpha[-1] / alpha[0]).log()
    return (prior + scaling + gained + log_det) / math.log(2)


def bits_per_dimension(
    denoiser: Denoiser, images: Tensor, index: list[int], seed: int = 0
) -> Tensor:
    """Bits a pixel and channel, float64 [B], of uint8 images [B, C, H, W]; lower is better.

    Uniform noise within each byte's bin makes the number an upper bound of the discrete
    distribution's (arXiv 1511.01844); one probe estimates the divergence. Both are functions of
    (seed, index of the image).

    Raises:
        ValueError: not uint8 images, or a process without a probability flow.
    """
    check_images(images)
    within = torch.stack(
        [torch.rand(images.shape[1:], generator=generator("cpu", seed, "bin", i)) for i in index]
    )
    x = (images + within.to(images.device) - 0.5) / 127.5 - 1
    probe = SampleNoise(seed, index, images.shape[1:], images.device)(0).sign()
    bits = log_likelihood(denoiser, x, probe)
    return math.log2(127.5) - bits / images[0].numel()


def _times(denoiser: Denoiser) -> Tensor:
    """The t that the integral visits, cleanest first."""
    process = denoiser.process
    if isinstance(process, DiscreteVP):
        return torch.arange(process.T)
    if not isinstance(process, ContinuousProcess):
        raise ValueError(
            f"the log-likelihood is known for DiscreteVP chains and continuous processes, not for "
            f"{type(process).__name__}: give a denoiser that was trained on one of them"
        )

    def ends(interval: Interval) -> Tensor:
        return process.times(torch.tensor([0.0, 1.0], dtype=torch.float64), interval)

    first, last = process.log_snr(ends(Interval()))
    parts = []
    for interval in denoiser.partition.intervals():
        clean, noisy = process.log_snr(ends(interval))
        n = 1 + math.ceil(GRID * ((clean - noisy) / (first - last)).item())
        t = process.at_log_snr(torch.linspace(clean, noisy, n, dtype=torch.float64))
        parts.append(t.clamp(*ends(interval)))
    return torch.cat(parts)


def _eps(denoiser: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
    return denoiser(x_t.float(), t.repeat(len(x_t))).eps.double()


def _eps_and_divergence(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """eps [B, ...] and its divergence [B] in x_t [B, ...]."""
    with torch.enable_grad():
        x_t = x_t.requires_grad_()
        eps = _eps(denoiser, x_t, t)
        if probe is not None:
            (row,) = torch.autograd.grad((eps * probe).sum(), x_t)
            return eps.detach(), (row * probe).flatten(1).sum(1)
        # A sample's eps depends on its own x_t alone, so the sum over samples mixes nothing.
        rows = [torch.autograd.grad(e, x_t, retain_graph=True)[0] for e in eps.sum(0)]
    divergence = torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
    return eps.detach(), divergence
