"""Intervals of one network weighed by how large their losses are (ANT-UW, arXiv 2306.00354)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertdiff.diffusion.partition import Interval
from expertdiff.methods.single import Diffusion


class Uncertainty(Diffusion):
    """One network that learns a weight for each interval of the partition (ANT-UW).

    The loss is the mean over the intervals of (exp(-u_i) L_i + u_i) / 2, L_i the mean loss in
    interval i, of which each batch has an equal number of t. The best u_i is ln L_i: all intervals
    then count alike, however small their losses. An expert of one interval would only learn the
    size of its own steps, so there is none of this kind.

    Args:
        uncertainty_lr: learning rate of u, which starts at 0.
        fixed: keep u_i at the logarithms of these losses, cleanest first, which gives weights
            1 / (2 L_i): the control.
        kwargs: see `Method`.

    Raises:
        ValueError: a partition of one interval, timesteps of the whole chain, losses that are not
            positive or not one an interval, or a batch with fewer items than intervals.
    """

    def __init__(
        self, uncertainty_lr: float = 0.025, fixed: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.uncertainty_lr, self.fixed = uncertainty_lr, fixed
        k = len(self.partition)
        if k < 2:
            raise ValueError(
                f"{self.partition} has one interval, whose learned weight is a step size: give "
                "more edges, or train it without weights by Diffusion or MDM"
            )
        if self.timesteps.bound:
            raise ValueError(
                f"{type(self.timesteps).__name__} draws from the whole chain, and Uncertainty from "
                "its intervals in turn: use Uniform timesteps"
            )
        if fixed is not None and (len(fixed) != k or min(fixed) <= 0):
            raise ValueError(
                f"fixed {list(fixed)} must be a positive loss for each of the {k} intervals"
            )
        u = torch.tensor([math.log(loss) for loss in fixed] if fixed else [0.0] * k)
        self.u = nn.Parameter(u.repeat(len(self.seeds), 1), requires_grad=fixed is None)

    @property
    def job(self) -> str:
        return "uncertainty"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if (size := self.trainer.datamodule.batch_size) < len(self.partition):
            raise ValueError(
                f"batches of {size} have not one t for each of the {len(self.partition)} "
                "intervals: use larger ones"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": list(self.network.parameters())}]
        if self.u.requires_grad:
            groups.append({"params": [self.u], "lr": self.uncertainty_lr, "weight_decay": 0.0})
        return groups

    def drawn(self, seed: int, key: tuple[int | str, ...]) -> list[Interval]:
        return self.partition.intervals()

    def averaged(self, each: Tensor) -> Tensor:
        parts = each.tensor_split(len(self.partition), dim=1)  # as they were drawn
        by_interval = torch.stack([part.mean(1) for part in parts], dim=1)
        return (((-self.u).exp() * by_interval + self.u) / 2).mean(1)

    def identity(self) -> dict[str, Any]:
        fixed = self.fixed and list(self.fixed)
        return super().identity() | {"uncertainty_lr": self.uncertainty_lr, "fixed": fixed}
