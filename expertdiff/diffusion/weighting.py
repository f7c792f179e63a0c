"""How much the loss at each t counts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from expertdiff.describe import Described
from expertdiff.diffusion.denoiser import Eps, PredictionType
from expertdiff.diffusion.process import NoiseProcess


class LossWeighting(Described, ABC):
    """The weight of the squared error of the network's output; never of the variance term."""

    @abstractmethod
    def __call__(
        self, process: NoiseProcess, t: Tensor, prediction: PredictionType | None = None
    ) -> Tensor:
        """w [B] float64 for t [B]; `prediction` is what the output means (``None``: eps)."""


class Simple(LossWeighting):
    """Every t alike (L_simple of DDPM)."""

    def __call__(
        self, process: NoiseProcess, t: Tensor, prediction: PredictionType | None = None
    ) -> Tensor:
        return torch.ones(t.shape, dtype=torch.float64, device=t.device)


class P2(LossWeighting):
    """1 / (k + snr)^gamma (arXiv 2204.00227, eq. 8); k = gamma = 1 is 1 - alpha_bar exactly."""

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        self.k, self.gamma = k, gamma

    def __call__(
        self, process: NoiseProcess, t: Tensor, prediction: PredictionType | None = None
    ) -> Tensor:
        return (self.k + process.snr(t)) ** -self.gamma


class MinSNR(LossWeighting):
    """min(snr, gamma) on the error of x0, whatever is predicted (arXiv 2303.09556, section 3.4).

    So of eps min(snr, gamma) / snr and of v min(snr, gamma) / (snr + 1); of any 1 where snr = 0.

    Raises:
        ValueError: gamma <= 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma {gamma} of MinSNR must be positive: 5 is usual")
        self.gamma = gamma

    def __call__(
        self, process: NoiseProcess, t: Tensor, prediction: PredictionType | None = None
    ) -> Tensor:
        snr = process.snr(t)
        weight = snr.clamp(max=self.gamma) / (prediction or Eps()).gain(snr)
        return torch.where(snr > 0, weight, 1.0)
