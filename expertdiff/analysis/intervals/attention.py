"""Intervals from how concentrated a network's attention is (MDM, equation 3)."""

import copy
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from expertdiff.analysis.intervals.base import Curve, IntervalMethod, Selection, three, trained
from expertdiff.analysis.intervals.segments import cheapest
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.devices import default_device
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.evaluation.kinds import kind
from expertdiff.seeds import generator

WEIGHTS = 2**24
"""Attention weights at a time: 64 MiB."""

FEWEST = 4
"""Points of a curve of three slopes."""


class AttentionConcentration(IntervalMethod):
    """Where the concentration of attention, on the way from noise to data, rises, stays and falls.

    The standard deviation of the attention weights over the keys, averaged over queries, heads and
    images, along DDIM paths; before layers are averaged, each is divided by what attention to a
    single key would give. The edges are two change points of the average's slope, by least squares:
    this rule is reconstructed, as the paper reads them by eye. An average that does not rise, stay
    and fall is refused. Takes networks whose attention modules have `queries_keys_values`, as
    ADM's.

    Args:
        samples: images that are drawn.
        steps: of DDIM, see `Sampler`.
        batch_size: images drawn at a time; does not change the result.
        seed: of the samples.

    Raises:
        ValueError: a number below 1.
    """

    source = "MDM, equation 3; the rule for the edges is reconstructed"

    def __init__(
        self,
        samples: int = 1000,
        steps: int | str = "ddim50",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if samples < 1 or batch_size < 1:
            raise ValueError(f"samples {samples} and batch_size {batch_size} must be at least 1")
        self.samples, self.steps = samples, steps
        self.batch_size, self.seed = batch_size, seed

    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        three(k, self)
        bundle, visited = trained(bundle, self), len(DDIM(self.steps).calls(process))
        if visited < FEWEST:
            raise ValueError(
                f"steps {self.steps} visit {visited} t, too few to see a curve rise, stay and "
                f"fall: give at least {FEWEST}"
            )
        x, keys, layers = self.curves(bundle)
        mean = (layers / bound(keys)[:, None]).mean(0)
        partition, cost = change_points(x, mean)
        lines = {"mean of the layers": mean} | dict(zip(names(keys), layers))
        quantities = ["relative concentration"] + len(layers) * ["concentration"]
        curves = [
            Curve(quantity, label, x.tolist(), y.tolist())
            for quantity, (label, y) in zip(quantities, lines.items())
        ]
        return Selection(self, partition, curves, cost)

    def curves(self, bundle: Bundle) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Progress [n], ascending; the number of keys [L] of each layer; its concentration [L, n].

        Raises:
            ValueError: the network has no attention.
        """
        device = default_device()
        denoiser = copy.deepcopy(bundle.denoiser).to(device)  # a copy keeps the hooks
        heard = _listen(denoiser)
        bounded = kind(bundle.manifest["shared"]["data"]).bounded
        sampler = DDIM(self.steps, clip=bounded)
        labels, total = self._labels(bundle.num_classes), 0.0
        t = sampler.calls(denoiser.process)
        batches = torch.arange(self.samples).split(self.batch_size)
        for index in tqdm(batches, desc=type(self).__name__, disable=None, leave=False):
            noise = SampleNoise(self.seed, index.tolist(), bundle.shape, device)
            y = None if labels is None else labels[index].to(device)
            for state in sampler.trajectory(denoiser, noise, y):
                if state.k and not heard:
                    raise ValueError(
                        f"the network of {bundle.folder} has no attention that can be read: "
                        "take another method, as LogSNR"
                    )
            keys, parts = zip(*heard)
            heard.clear()
            total = total + torch.stack(parts).unflatten(0, (len(t), -1)).cpu()
        layers = (total / self.samples).T.flip(1).numpy()
        progress = denoiser.process.progress(t.flip(0)).numpy()
        return progress, np.array(keys[: len(layers)]), layers

    def _labels(self, num_classes: int | None) -> Tensor | None:
        if num_classes is None:
            return None
        draws = generator("cpu", self.seed, "labels")
        return torch.randint(num_classes, (self.samples,), generator=draws)


def _listen(denoiser: nn.Module) -> list[tuple[int, Tensor]]:
    """A list that each attention adds its number of keys and its concentration, summed, to.

    A single key is nothing to concentrate on.
    """
    heard: list[tuple[int, Tensor]] = []

    def hear(module: nn.Module, inputs: tuple[Tensor]) -> None:
        q, k, _ = module.queries_keys_values(*inputs)
        if k.shape[2] > 1:
            heard.append((k.shape[2], concentration(q, k).double().sum()))

    for module in denoiser.modules():
        if hasattr(module, "queries_keys_values"):
            module.register_forward_pre_hook(hear)
    return heard


def concentration(q: Tensor, k: Tensor) -> Tensor:
    """Standard deviation over the keys of softmax(q k^T / sqrt d), averaged: [B], float32.

    Args:
        q: queries [B, heads, n, d].
        k: keys [B, heads, n, d].
    """
    heads, n, d = q.shape[1:]
    rows = max(1, WEIGHTS // n**2)
    pairs = zip(q.flatten(0, 1).split(rows), k.flatten(0, 1).split(rows))
    scores = ((a.float() / d**0.5) @ b.float().mT for a, b in pairs)
    parts = [score.softmax(-1).std(-1, correction=0).mean(-1) for score in scores]
    return torch.cat(parts).unflatten(0, (-1, heads)).mean(1)


def bound(keys: np.ndarray) -> np.ndarray:
    """The concentration of attention to one of so many keys: sqrt(n - 1) / n."""
    return np.sqrt(keys - 1) / keys


def names(keys: np.ndarray) -> list[str]:
    """``r-o`` of each layer in the order of calls: the o-th layer of r x r pixels."""
    seen: Counter[int] = Counter()
    result = []
    for n in keys.tolist():
        seen[n] += 1
        result.append(f"{n**0.5:g}-{seen[n]}")
    return result


def change_points(x: np.ndarray, y: np.ndarray) -> tuple[Partition, float]:
    """The partition at two of the points x [n] between which the slope of y [n] is most nearly one.

    Least squares of dy/dx about its mean in each of the three intervals, which is the second
    number returned. Each interval holds at least a tenth of the points: shorter ones follow noise.

    Args:
        x: progress, from data to noise, ascending; n at least 4.
        y: that rises, stays and falls on the way from noise to data.

    Raises:
        ValueError: the mean slopes do not do so.
    """
    slope = np.diff(y) / np.diff(x)

    def cost(i: int, j: int) -> float:
        points = j - i + (i == 0)  # the first interval begins before the first point
        return (j - i) * slope[i:j].var() if 10 * points >= len(x) else np.inf

    ends, least = cheapest(len(slope), 3, cost)
    partition = Partition([0, *x[ends[1:-1]].tolist(), 1])
    # The slope on the way from noise to data is that in the progress, with the other sign.
    falling, flat, rising = (-slope[i:j].mean() for i, j in zip(ends, ends[1:]))
    if not (rising > 0 > falling and abs(flat) < min(rising, -falling)):
        raise ValueError(
            "from noise to data the curve does not rise, stay and fall: its mean slopes in the "
            f"most likely {partition} are {rising:.3g}, {flat:.3g} and {falling:.3g}; "
            "take another method, as LogSNR"
        )
    return partition, least
