"""Intervals in which a network's training gradients agree (ANT, arXiv 2306.00354)."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from expertdiff.analysis.intervals.base import Cells, Curve, IntervalMethod, Selection, trained
from expertdiff.analysis.intervals.segments import middle
from expertdiff.bundle import Bundle
from expertdiff.data.base import Batch, Data, permutation
from expertdiff.describe import build, describe
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import Denoiser, NetworkDenoiser
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.networks.network import Network
from expertdiff.seeds import generator

EXACT = 10**7
"""Parameters up to which whole gradients are kept: 4 GB for 100 cells."""

SKETCH = 2**16
"""Numbers that are kept of a larger gradient; cosines are then off by about 0.004."""


class GradientSimilarity(IntervalMethod):
    """Intervals in which a single network's gradients point the same way as in their middle.

    Of the loss without weighting, on the same images and noise at every t: the least sum of minus
    cos(gradient at t, gradient in the interval's middle). Gradients of more than 1e7 parameters are
    compared by a fixed random sketch of 65,536 numbers.

    Args:
        images: of the training split; all, where there are fewer.
        batch_size: images at a time; does not change the result.
        seed: of the choice of images, their noise and the sketch.

    Raises:
        ValueError: a number below 1.
    """

    source = "ANT (arXiv 2306.00354), gradient-based, at one checkpoint"

    def __init__(self, images: int = 256, batch_size: int = 64, seed: int = 0) -> None:
        if images < 1 or batch_size < 1:
            raise ValueError(f"images {images} and batch_size {batch_size} must be at least 1")
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        bundle, cells = trained(bundle, self), Cells.of(process)
        if not isinstance(bundle.denoiser, NetworkDenoiser):
            raise ValueError(
                f"{bundle.folder} holds several networks, and their gradients cannot be compared: "
                "name the bundle of a single network"
            )
        affinity = self.affinity(bundle.denoiser, data, cells.t)
        partition, cost = cells.cut(k, lambda i, j: -affinity[middle(i, j), i:j].sum())
        ends = [cells.partition.edges.index(edge) for edge in partition.edges]
        curves = []
        for centre in map(middle, ends, ends[1:]):
            label = f"with t = {cells.t[centre]:g}"
            y = affinity[centre].tolist()
            curves.append(Curve("cosine of gradients", label, cells.progress, y))
        return Selection(self, partition, curves, cost)

    def affinity(self, denoiser: NetworkDenoiser, data: Data, t: Tensor) -> np.ndarray:
        """cos(gradient at t_i, gradient at t_j), [n, n] for t [n]."""
        device = default_device()
        # A copy, because a bundle's own weights want no gradients.
        denoiser = copy.deepcopy(denoiser).to(device)
        parameters = _learned(denoiser.network)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        batches = self._batches(data, with_labels=denoiser.network.num_classes is not None)
        size = sum(parameter.numel() for parameter in parameters)
        large = size > EXACT
        keep = Sketch(size, self.seed) if large else nn.Identity()
        rows = torch.empty(len(t), SKETCH if large else size, device=device)
        for time, row in zip(tqdm(t, desc=type(self).__name__, disable=None, leave=False), rows):
            denoiser.zero_grad(set_to_none=False)
            for batch, eps in batches:
                _loss(denoiser, batch, eps, time.to(eps.device).repeat(len(eps))).backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            row.copy_(F.normalize(keep(gradient), dim=0))
        return (rows @ rows.T).double().cpu().numpy()

    def _batches(self, data: Data, with_labels: bool) -> list[tuple[Batch, Tensor]]:
        """The images with their labels (if the network takes any), and their noise."""
        items, labels = data.split("train")
        order = permutation(len(items), self.seed, "gradients")[: self.images]
        batches, device = [], default_device()
        for index in torch.from_numpy(order).split(self.batch_size):
            x0, y = data.scaled(items[index].to(device)), labels[index].to(device)
            eps = SampleNoise(self.seed, index.tolist(), x0.shape[1:], device)(0)
            batches.append((Batch(x0, y if with_labels else None, index), eps))
        return batches


class Sketch:
    """A random projection that keeps scalar products on average (count sketch).

    Every number is added to, or subtracted from, one of 65,536 sums (Charikar, Chen and
    Farach-Colton 2002).

    Args:
        size: of the vectors.
        seed: of the projection.
    """

    def __init__(self, size: int, seed: int) -> None:
        draws = generator("cpu", seed, "sketch")
        # The sign is in the sum's index: half of the sums count as negative.
        sums = torch.randint(2 * SKETCH, (size,), generator=draws, dtype=torch.int32)
        self.sums = sums.to(default_device())

    def __call__(self, vector: Tensor) -> Tensor:
        """[65536] of a vector [size]."""
        plus, minus = vector.new_zeros(2 * SKETCH).index_add_(0, self.sums, vector).chunk(2)
        return plus - minus


def _learned(network: Network) -> list[nn.Parameter]:
    """The parameters that training changes, which now want gradients."""
    # Those of a bundle are all switched off, so a network built anew tells which ones are frozen.
    fresh = build(describe(network), Network)
    names = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    return [p.requires_grad_() for name, p in network.named_parameters() if name in names]


def _loss(denoiser: Denoiser, batch: Batch, eps: Tensor, t: Tensor) -> Tensor:
    x0 = denoiser.from_data(batch.x0)[0].detach()
    x_t = denoiser.process.add_noise(x0, eps, t)
    prediction = denoiser(x_t, t, batch.y)
    mse, vb = losses(prediction, denoiser.prediction, denoiser.process, x0, eps, t)
    return (mse + vb).sum()
