"""Guidance: a denoiser made from another one, whose samples follow labels or data more closely."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.process import expand


class Guidance(Described, ABC):
    """Turns a denoiser into a guided one."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The guided denoiser; raises a ValueError where this one cannot be guided."""

    def check(self, data: Mapping[str, Any]) -> None:
        """Raises a ValueError where a model of these data (`Data.identity`) cannot be guided."""


class ClassifierFree(Guidance):
    """eps = eps_null + scale (eps_y - eps_null) (arXiv 2207.12598, eq. 6 with scale = 1 + w).

    Both are one call of the denoiser, on twice the batch. Channels that are not guided are as the
    label has them, and so is the learned variance.

    Args:
        scale: 1 is the model as it is, 0 that of no label; a common choice is 1.5 to 4.
        channels: guide only so many, from the first on; ``None`` guides all. Published DiT figures
            have 3 of the 4 channels guided.

    Raises:
        ValueError: a scale that is negative or not finite, or fewer than 1 channel.
    """

    def __init__(self, scale: float, channels: int | None = None) -> None:
        if not 0 <= scale < math.inf:
            raise ValueError(f"guidance scale {scale} must be 0 or more: 1 does not guide")
        if channels is not None and channels < 1:
            raise ValueError(f"guidance of {channels} channels: give 1 or more, or null for all")
        self.scale, self.channels = scale, channels

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The guided denoiser; `denoiser` itself at scale 1.

        Raises:
            ValueError: a network of `denoiser` has no label that means "of no class".
        """
        null = null_class(denoiser)
        return denoiser if self.scale == 1 else Guided(denoiser, null, self.scale, self.channels)


class Guided(Denoiser):
    """What `ClassifierFree` makes of a denoiser.

    Args:
        denoiser: what is guided.
        null: its label that means "of no class".
        scale: see `ClassifierFree`.
        channels: see `ClassifierFree`.
    """

    def __init__(self, denoiser: Denoiser, null: int, scale: float, channels: int | None) -> None:
        super().__init__()
        self.denoiser, self.null, self.scale, self.channels = denoiser, null, scale, channels
        self.process, self.partition = denoiser.process, denoiser.partition

    @property
    def flow(self) -> nn.Module | None:
        return self.denoiser.flow

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        if y is None:
            raise ValueError("guidance came without labels y to follow: give them, or set scale 1")
        if (self.channels or 1) > x_t.shape[1]:
            raise ValueError(
                f"guidance of {self.channels} channels does not fit x_t of {x_t.shape[1]}: "
                "give as many at most, or null for all"
            )
        labels = torch.cat([y, torch.full_like(y, self.null)])
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
        variance = None if both.variance is None else both.variance.chunk(2)[0]
        # Guiding x0 as well keeps x_t = alpha x0 + sigma eps, without a division by a small alpha.
        return Prediction(self._guided(both.x0), self._guided(both.eps), variance)

    def _guided(self, both: Tensor) -> Tensor:
        labelled, null = both.chunk(2)
        guided, k = null.lerp(labelled, self.scale), self.channels or both.shape[1]
        return torch.cat([guided[:, :k], labelled[:, k:]], dim=1)


class Discriminated(Denoiser):
    """eps' = eps - weight sigma grad_x l(x_t, t), l being the logit of real against generated.

    grad_x l of a perfect logit is the score of noised data minus that of noised samples, so at
    weight 1 a perfect logit corrects any denoiser. The logit itself is differentiated, in float32:
    a sigmoid would saturate where it is surest (Kim et al. 2023, arXiv 2211.17091, eq. 8). Of a
    sampler of second order only the first call of a step is guided, as there.

    Args:
        denoiser: what is guided.
        logit: ``(x_t [B, ...], t [B]) -> l [B]``, differentiable in x_t.
        weight: 0 does not guide.
    """

    def __init__(self, denoiser: Denoiser, logit: nn.Module, weight: float) -> None:
        super().__init__()
        self.denoiser, self.logit, self.weight = denoiser, logit, weight
        self.process, self.partition = denoiser.process, denoiser.partition

    @property
    def flow(self) -> nn.Module | None:
        return self.denoiser.flow

    @property
    def ahead(self) -> Denoiser:
        return self.denoiser

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        plain = self.denoiser(x_t, t, y)
        moved = t.to(x_t.device, non_blocking=True)
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(moved))
        push = self.weight * sigma * self._gradient(x_t, t)
        # Both are moved, as x_t = alpha x0 + sigma eps.
        return replace(plain, x0=plain.x0 + sigma / alpha * push, eps=plain.eps - push)

    def _gradient(self, x_t: Tensor, t: Tensor) -> Tensor:
        # Samplers run without gradients, and Lightning's predictions in inference mode.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(x_t.device.type, enabled=False),
        ):
            x = x_t.detach().float().clone().requires_grad_()
            return torch.autograd.grad(self.logit(x, t.clone()).sum(), x)[0]


def null_class(denoiser: Denoiser) -> int:
    """The label that all networks of `denoiser` take for none.

    Raises:
        ValueError: they have no such label, or not the same one.
    """
    labels = {net.null_class for net in denoiser.modules() if hasattr(net, "null_class")}
    if len(labels) != 1 or None in labels:
        found = " and ".join(sorted(str(label) for label in labels)) or None
        raise ValueError(
            f"guidance needs a label for no class, and the model's null_class is {found}: train a "
            "network with num_classes, and with label_dropout above 0"
        )
    return labels.pop()
