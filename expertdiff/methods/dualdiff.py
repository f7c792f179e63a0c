"""Two or more experts and a learned gate, trained together (DualDiff, by The AI Scientist)."""

from typing import Any

import torch
from torch import Tensor, nn

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Prediction
from expertdiff.experts.gated import GatedExperts
from expertdiff.methods.single import Diffusion


class DualDiff(Diffusion):
    """Experts of the whole chain, blended by a gate; the gate is part of the network.

    Args:
        diversity: subtract this times the mean Euclidean distance of all pairs in the batch, of
            the predicted noise (the paper's "diversity loss"; any network can have it).
        balance: add this times N sum_n (mean_batch g_n)^2 - 1, which is 0 where all experts have
            equal shares and N - 1 where one has all; needs `GatedExperts`.
        kwargs: see `Method`.

    Raises:
        ValueError: a negative strength, or a balance of no gate.
    """

    def __init__(self, diversity: float = 0.0, balance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if diversity < 0 or balance < 0:
            raise ValueError(f"diversity {diversity} and balance {balance} must not be negative")
        self.diversity, self.balance = diversity, balance
        if balance:
            if not isinstance(self.network, GatedExperts):
                raise ValueError(
                    f"{type(self.network).__name__} has no gate for balance {balance}: use "
                    "GatedExperts, or a balance of 0"
                )
            self.network.gating_network.register_forward_hook(self._keep)

    @property
    def job(self) -> str:
        return "dualdiff"

    def _keep(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._logits = logits

    def regularised(self, batch: Batch, prediction: Prediction, t: Tensor) -> Tensor | float:
        seeds, added = len(self.seeds), 0.0
        if self.diversity:
            added = added - self.diversity * mean_distance(prediction.eps.unflatten(0, (seeds, -1)))
        if self.balance:
            weights = self.network.gate(self._logits.float())
            share = weights.reshape(seeds, -1, weights.shape[-1]).mean(1)
            added = added + self.balance * (share.shape[-1] * share.square().sum(-1) - 1)
        return added

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"diversity": self.diversity, "balance": self.balance}


def mean_distance(x: Tensor) -> Tensor:
    """The mean Euclidean distance [S] of all B^2 pairs of x [S, B, ...], each with itself too."""
    x = x.flatten(2)
    # The quick way by inner products would leave a square root of rounding errors on the diagonal.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").mean((1, 2))
