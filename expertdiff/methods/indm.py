"""A flow and the diffusion of what it makes of the data, trained as one (INDM)."""

import math
from typing import Any

import torch
from torch import Tensor

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps, Prediction
from expertdiff.diffusion.process import ContinuousProcess
from expertdiff.diffusion.timesteps import Likelihood
from expertdiff.diffusion.weighting import Simple
from expertdiff.methods.single import Diffusion
from expertdiff.networks.flow import Flowed


class INDM(Diffusion):
    """Maximum likelihood of a flow z = h(x) and a diffusion of z, jointly (arXiv 2205.13699).

    The loss is an upper bound of the negative log-likelihood of x, in nats a dimension:
    L_score(z) + `remainder`, with L_score = 1/(2D) int (g^2 / sigma^2) |eps_hat - eps|^2 dt, whose
    gradient reaches the flow through x_t = alpha z + sigma eps. Its t are drawn by `Likelihood`;
    eps is predicted, and nothing weighted. This is the paper's NLL mode; its FID mode is not here.

    Args:
        kwargs: see `Method`; the network is a `Flowed`, the process in continuous time.

    Raises:
        ValueError: a network without a flow, or a process that is not continuous.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(prediction=Eps(), timesteps=Likelihood(), weighting=Simple(), **kwargs)
        if not isinstance(self.network, Flowed):
            raise ValueError(
                f"{type(self.network).__name__} has no flow in front: use it in a Flowed network"
            )
        self.network.flow.requires_grad_(True)

    @property
    def job(self) -> str:
        return "indm"

    def mapped(self, x0: Tensor) -> Tensor:
        z, log_det = self.denoiser.from_data(x0)
        self._remainder = remainder(self.process, z, log_det)
        return z

    def regularised(self, batch: Batch, prediction: Prediction, t: Tensor) -> Tensor:
        return self._remainder.unflatten(0, (len(self.seeds), -1)).mean(1)


def remainder(process: ContinuousProcess, z: Tensor, log_det: Tensor) -> Tensor:
    """What the bound of INDM has beside L_score: nats a dimension [B].

    (-ln p(z_T) - ln |det dz/dx|) / D + ln(sigma_0 / alpha_0) - ln sigma_T, where 0 is the cleanest
    t that is trained and T the noisiest, and p(z_T) the normal distribution that sampling starts
    from; -ln p(z_T) is its mean over the noise. The last two terms are what remains of the score of
    q(z_t | z), of the drift's divergence and of the step from t = 0 to the data (arXiv 2101.09258,
    theorem 3), as int g^2 / sigma^2 dt = ln snr_0 - ln snr_T.

    Args:
        process: of the chain.
        z: where it begins, [B, ...].
        log_det: ln |det dz/dx|, [B].
    """
    ends = torch.tensor([process.T_MIN, 1], dtype=torch.float64)
    (alpha_0, alpha_T), (sigma_0, sigma_T) = (c.tolist() for c in process.alpha_sigma(ends))
    variance = process.prior_std**2
    square = alpha_T**2 * z.flatten(1).square().mean(1) + sigma_T**2
    prior = (square / variance + math.log(2 * math.pi * variance)) / 2
    constant = math.log(sigma_0 / alpha_0) - math.log(sigma_T)
    return prior + constant - log_det / z[0].numel()
