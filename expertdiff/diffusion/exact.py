"""The best possible denoiser of a known distribution: what a network can at most learn."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess, expand

PAIRS = 2**22
"""Points times centres at once: 32 MiB a tensor where attention is not computed tile by tile."""


class Mixture(NamedTuple):
    """Gaussians with one diagonal covariance; float64.

    Attributes:
        centres: [K, D].
        shares: [K], summing to 1.
        std: [D], of every Gaussian; 0 makes a finite set of points.
    """

    centres: Tensor
    shares: Tensor
    std: Tensor


class ExactDenoiser(Denoiser):
    """The posterior mean of x0 given x_t [B, ...] with D values an item, when x0 is a mixture.

    With v = sigma^2 + alpha^2 std^2 (a vector [D]), centre k has the weight

        w_k ~ share_k exp(-sum_d (x_t - alpha c_k)^2 / (2 v))

    and the posterior mean is ``(sigma^2 sum_k w_k c_k + alpha std^2 x_t) / v``. Computed in
    float64, returned in float32, differentiable. A mixture of the training points themselves (std
    0) gives the denoiser that a network would learn by heart (arXiv 2206.00364, appendix B.3).

    Args:
        mixture: the distribution of x0.
        process: the noise process.
    """

    variance: Tensor
    features: Tensor
    values: Tensor

    def __init__(self, mixture: Mixture, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        centres, shares, std = (tensor.double() for tensor in mixture)
        features = torch.cat([centres, centres.square(), shares.log()[:, None]], dim=1)
        self.register_buffer("variance", std.square(), persistent=False)
        self.register_buffer("features", features, persistent=False)
        # As wide as the features, or attention would not be computed tile by tile.
        width = features.shape[1] - centres.shape[1]
        self.register_buffer("values", functional.pad(centres, (0, width)), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        x = x_t.flatten(1).double()
        alpha, sigma = (expand(c, x) for c in self.process.alpha_sigma(t.to(x.device)))
        v = sigma.square() + alpha.square() * self.variance
        # log w_k up to a constant of the row, as one product: x^2 is the same for all centres.
        factors = [alpha * x / v, -alpha.square() / (2 * v), torch.ones_like(sigma)]
        rows = max(1, PAIRS // len(self.features))
        centre = torch.cat([self._mean(chunk) for chunk in torch.cat(factors, 1).split(rows)])
        x0 = (sigma.square() * centre + alpha * self.variance * x) / v
        # (x - alpha x0) / sigma, written so that it keeps its digits where sigma is small.
        eps = sigma * (x - alpha * centre) / v
        return Prediction(x0.float().reshape(x_t.shape), eps.float().reshape(x_t.shape))

    def _mean(self, factors: Tensor) -> Tensor:
        """sum_k w_k c_k [B, D], which is attention: its CPU kernel holds no B x K numbers."""
        query, key, value = (x[None, None] for x in (factors, self.features, self.values))
        mean = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return mean[0, 0, :, : len(self.variance)]


def terminal_mismatch(process: NoiseProcess, x0: Tensor) -> float:
    """KL(q(x_T) || prior) in bits, at the noisiest t: how wrong it is to start from pure noise.

    Of the Gaussian with the mean and the covariance of x0 [N, D], so a lower bound: what x_T lacks
    to be a Gaussian is left out. On toy sets that is a tenth at alpha_bar_T = 0.36, and nothing to
    speak of where the mismatch is small. The covariance is a D x D matrix, so D must be small.
    """
    x0 = x0.double()
    last = process.times(torch.tensor([1 - 2**-24], device=x0.device), Interval())
    alpha, sigma = (c / process.prior_std for c in process.alpha_sigma(last))
    mean = alpha * x0.mean(0)
    identity = torch.eye(x0.shape[1], dtype=x0.dtype, device=x0.device)
    covariance = alpha.square() * x0.T.cov(correction=0) + sigma.square() * identity
    square = covariance.trace() + mean.square().sum() - x0.shape[1]
    return ((square - covariance.logdet()) / (2 * math.log(2))).item()
