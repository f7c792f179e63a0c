"""Per-sample training losses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from expertdiff.diffusion.denoiser import Prediction, PredictionType
from expertdiff.diffusion.process import DiscreteVP, NoiseProcess, expand


class Losses(NamedTuple):
    """Per-sample losses [B]: the output's squared error, and the variance term (0 if unlearned)."""

    mse: Tensor
    vb: Tensor


def losses(
    prediction: Prediction,
    kind: PredictionType,
    process: NoiseProcess,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
) -> Losses:
    """The hybrid loss of IDDPM (arXiv 2102.09672, eq. 16), its two terms apart.

    Args:
        prediction: what the denoiser says about x_t, [B, ...].
        kind: what the network's output means, so what is squared.
        process: the noise process; must be a `DiscreteVP` when the variance is learned.
        x0, eps: data and noise that made x_t, [B, ...].
        t: [B].
    """
    alpha, sigma = (expand(c, x0) for c in process.alpha_sigma(t))
    # `target` of a prediction's own x0 and eps is the network's output again.
    error = kind.target(prediction.x0, prediction.eps, alpha, sigma) - kind.target(
        x0, eps, alpha, sigma
    )
    mse = _mean(error.square())
    if prediction.variance is None:
        return Losses(mse, torch.zeros_like(mse))
    return Losses(mse, variational_bound(prediction, process, x0, eps, t))


def variational_bound(
    prediction: Prediction, process: NoiseProcess, x0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """KL(q(x_{t-1}|x_t,x0) || p) in bits a dimension, the NLL of x0 at t = 0; [B].

    Trains the variance only: the mean is detached (IDDPM, section 3.1).
    """
    if not isinstance(process, DiscreteVP):
        raise ValueError(
            f"a learned variance needs a DiscreteVP process, not {type(process).__name__}: "
            "set learn_sigma to false"
        )
    log_posterior = expand(process.posterior_log_variance(t), x0)
    beta = process.betas[t]
    log_variance = learned_log_variance(prediction, expand(beta.log(), x0), log_posterior)
    # The means differ by c (x0 - x0_hat); written with eps it keeps its digits where alpha -> 0.
    _, sigma = process.alpha_sigma(t)
    error = expand(beta / (sigma * (1 - beta).sqrt()), x0) * (eps - prediction.eps.detach())
    kl = 0.5 * (
        log_variance
        - log_posterior
        - 1
        + (log_posterior - log_variance).exp()
        + error.square() * (-log_variance).exp()
    )
    nll = -discretised_log_likelihood(x0, prediction.x0.detach(), 0.5 * log_variance)
    return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)


def learned_log_variance(
    prediction: Prediction, log_beta: Tensor | float, log_posterior: Tensor | float
) -> Tensor:
    """log variance between beta~ (v = -1) and beta (v = 1) (IDDPM, eq. 15)."""
    fraction = (prediction.variance + 1) / 2
    return fraction * log_beta + (1 - fraction) * log_posterior


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log-probability of the 1/127.5-wide bin around x in [-1, 1] under a Gaussian, elementwise.

    The first and last bin hold the tails; the normal CDF is Page's tanh approximation, as in ADM.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_scale).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_scale).exp())
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
