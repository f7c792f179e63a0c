"""The exact log-likelihood of points under a denoiser's probability flow."""

import math

import torch
from torch import Tensor

from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.process import DiscreteVP


@torch.inference_mode(False)  # inside it no gradient can be had
@torch.no_grad()
def log_likelihood(denoiser: Denoiser, x: Tensor) -> Tensor:
    """The log-density in bits, float64 [B], of points x [B, D] under the probability flow.

    `x` is taken to be x_t at t = 0, so the density is that of the flow's marginal there: of
    alpha_0 x0 + sigma_0 eps, which is the data blurred by sigma_0.

    In xbar = x_t / alpha and s = sigma / alpha the flow is d xbar / ds = eps(x_t, t), and along it
    d log p(xbar) / d ln s = -sigma div eps(x_t, t) (arXiv 2011.13456, equation 39). Heun's method
    takes xbar from t = 0 to T - 1, where x_t is N(0, I), as the sampler's start is; the divergence,
    by D backward passes a timestep, is integrated over ln s by the trapezoidal rule, where it goes
    to D smoothly while s of the last step may grow thirtyfold. All that is inexact is the grid: it
    shows in hundredths of a bit where modes are as narrow as sigma_0, and hardly elsewhere.

    Args:
        denoiser: of a `DiscreteVP` chain, in float32; it is called 2 T - 1 times.
        x: [B, D], D small.

    Raises:
        ValueError: another noise process, or another shape.
    """
    process = denoiser.process
    if not isinstance(process, DiscreteVP):
        raise ValueError(
            f"the log-likelihood is known for DiscreteVP chains only, not for "
            f"{type(process).__name__}: give a denoiser that was trained on such a chain"
        )
    if x.ndim != 2:
        raise ValueError(f"points of shape {list(x.shape)} given: [B, D] is needed")
    alpha, sigma = process.alpha_sigma(torch.arange(process.T))
    s = (sigma / alpha).tolist()
    xbar, slopes = x.double() / alpha[0], []
    for t in range(process.T):
        eps, divergence = _eps_and_divergence(denoiser, alpha[t] * xbar, t)
        slopes.append(sigma[t] * divergence)
        if t + 1 < process.T:
            ahead = alpha[t + 1] * (xbar + (s[t + 1] - s[t]) * eps)
            xbar = xbar + (s[t + 1] - s[t]) / 2 * (eps + _eps(denoiser, ahead, t + 1))

    gained = torch.trapezoid(torch.stack(slopes), (sigma / alpha).log().to(x.device), dim=0)
    last = -0.5 * ((alpha[-1] * xbar).square() + math.log(2 * math.pi)).sum(1)
    scaling = x.shape[1] * (alpha[-1] / alpha[0]).log()
    return (last + scaling + gained) / math.log(2)


def _eps(denoiser: Denoiser, x_t: Tensor, t: int) -> Tensor:
    return denoiser(x_t.float(), torch.full((len(x_t),), t)).eps.double()


def _eps_and_divergence(denoiser: Denoiser, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """eps [B, D] and its divergence [B] in x_t [B, D]."""
    with torch.enable_grad():
        x_t = x_t.requires_grad_()
        eps = _eps(denoiser, x_t, t)
        # A sample's eps depends on its own x_t alone, so the sum over samples mixes nothing.
        rows = [torch.autograd.grad(e, x_t, retain_graph=True)[0] for e in eps.sum(0)]
    divergence = torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
    return eps.detach(), divergence
