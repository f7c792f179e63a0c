"""What a model stores, and what acts at each part of the chain."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.networks.network import Network


@dataclass(frozen=True)
class Active:
    """What acts in an interval.

    Attributes:
        interval: where.
        parameters: that the prediction there depends on.
        flops: of one item's prediction, two a multiply-add, as torch counts them: products only.
    """

    interval: Interval
    parameters: int
    flops: int


def stored(denoiser: Denoiser) -> int:
    """All parameters."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def active(denoiser: Denoiser, shape: Sequence[int]) -> list[Active]:
    """What acts in each interval of the denoiser's partition; nothing is computed.

    Args:
        denoiser: a model.
        shape: of one item of its data.
    """
    # A copy of which the weights are no copies, and take no memory.
    parameters = {id(p): torch.empty_like(p, device="meta") for p in denoiser.parameters()}
    bare = {key: torch.nn.Parameter(empty) for key, empty in parameters.items()}
    denoiser = copy.deepcopy(denoiser, bare).to("meta")
    classes = next(m.num_classes for m in denoiser.modules() if isinstance(m, Network))
    y = None if classes is None else torch.zeros(1, dtype=torch.int64, device="meta")
    parameters, found = list(denoiser.parameters()), []
    for interval in denoiser.partition.intervals():
        t = _within(denoiser.process, interval)
        # By products alone: not every torch counts its fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            prediction = denoiser(torch.zeros(1, *shape, device="meta"), t, y)
        used = torch.autograd.grad(prediction.eps.sum(), parameters, allow_unused=True)
        count = sum(p.numel() for p, gradient in zip(parameters, used) if gradient is not None)
        found.append(Active(interval, count, counter.get_total_flops()))
    return found


def _within(process: NoiseProcess, interval: Interval) -> torch.Tensor:
    return process.times(torch.tensor([0.5]), interval)
