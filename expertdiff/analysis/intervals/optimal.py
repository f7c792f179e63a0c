"""Intervals from the best possible denoiser of the data (multi-stage, arXiv 2312.09181)."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from expertdiff.analysis.intervals.base import Cells, Curve, IntervalMethod, Selection, three
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.devices import default_device
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess, expand
from expertdiff.seeds import generator

ROWS = 512
"""Triples at a time."""

VALUES = 2**23
"""Numbers of the data at a time: 64 MiB in float64."""

Reference = Literal["script", "paper"]


class OptimalDenoiser(IntervalMethod):
    """Where the denoiser of the data is nearly that of the clean end, or of the noisy end.

    eps* is what the best denoiser of the training items says. The clean interval is the longest
    from 0 on where eps* is nearly eps, the noisy one the longest up to 1 where it is nearly what
    the noisy end says: nearly is a difference of at most `eta` in a share of at least `share` of
    the coordinates, on average over the interval. Needs data only. Edges depend on `eta`, `share`
    and the dimension of the data.

    Args:
        eta: the difference that counts as none.
        share: of the coordinates (not in the paper).
        triples: of item, noise and t, the same number in each cell of the chain (not in the paper).
        reference: what the noisy end says: ``"script"``, (x_t - alpha mean of the data) / sigma at
            x_t, as in the paper's code; ``"paper"``, eps* at the noisiest t for the same item and
            noise, as in its equation 5. They differ much.
        seed: of the triples.

    Raises:
        ValueError: a number out of range, or an unknown reference.
    """

    source = "multi-stage (arXiv 2312.09181), equation 5; share and triples are not in the paper"

    def __init__(
        self,
        eta: float = 2 / 256,
        share: float = 0.9,
        triples: int = 4000,
        reference: Reference = "script",
        seed: int = 0,
    ) -> None:
        if not (eta > 0 and 0 < share < 1 and triples >= 1):
            raise ValueError(
                f"eta {eta} and triples {triples} must be positive, share {share} between 0 and 1"
            )
        if reference not in get_args(Reference):
            raise ValueError(f"reference {reference!r} must be one of script, paper")
        self.eta, self.share, self.triples = eta, share, triples
        self.reference, self.seed = reference, seed

    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        three(k, self)
        cells = Cells.of(process)
        clean, noisy = self.nearness(process, data, cells.t)
        edges = cells.partition.edges
        below, above = _running(clean), _running(noisy[::-1])[::-1]
        t1 = edges[1 + self._where("clean", below).max()]
        t2 = edges[self._where("noisy", above).min()]
        if t1 >= t2:
            raise ValueError(
                f"the clean interval would end at {t1:g}, and the noisy one begin at {t2:g} (the "
                f"average shares are {_range(below)} and {_range(above)}): "
                f"lower eta {self.eta:.3g} or raise share {self.share:g}"
            )
        curves = [
            Curve("share of coordinates", f"near the {end} end", cells.progress, y.tolist())
            for end, y in (("clean", clean), ("noisy", noisy))
        ]
        return Selection(self, Partition([0, t1, t2, 1]), curves)

    def nearness(
        self, process: NoiseProcess, data: Data, t: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shares [n] of coordinates where eps* at t [n] is that of the clean and the noisy end."""
        each = self.triples // len(t)
        if not each:
            raise ValueError(
                f"{self.triples} triples leave some of {len(t)} cells without any: "
                f"give at least {len(t)}"
            )
        items, draws = data.split("train")[0], generator("cpu", self.seed, "triples")
        chosen = torch.randint(len(items), (each * len(t),), generator=draws)
        mean = _mean(items, data.scaled)
        noisiest = process.times(torch.tensor([1 - 2**-24]), Interval())
        shares = []
        batches = list(zip(chosen.split(ROWS), t.repeat_interleave(each).split(ROWS)))
        for index, times in tqdm(batches, desc=type(self).__name__, disable=None, leave=False):
            y = _flat(items[index], data.scaled)
            eps = torch.randn(y.shape, generator=draws, dtype=torch.float64).to(y.device)
            times = times.to(y.device)
            x_t = process.add_noise(y, eps, times)
            best = optimal_eps(x_t, times, process, items, data.scaled)
            if self.reference == "script":
                alpha, sigma = (expand(c, x_t) for c in process.alpha_sigma(times))
                end = (x_t - alpha * mean) / sigma
            else:
                last = noisiest.to(y.device).expand(len(y))
                x_1 = process.add_noise(y, eps, last)
                end = optimal_eps(x_1, last, process, items, data.scaled)
            near = [((best - other).abs() <= self.eta).double().mean(1) for other in (eps, end)]
            shares.append(torch.stack(near))
        clean, noisy = torch.cat(shares, 1).unflatten(1, (len(t), each)).mean(2).cpu().numpy()
        return clean, noisy

    def _where(self, end: str, average: np.ndarray) -> np.ndarray:
        """The cells up to, or from, which the average share is high enough."""
        where = np.flatnonzero(average >= self.share)
        if not len(where):
            raise ValueError(
                f"nowhere are {self.share:g} of the coordinates within {self.eta:.3g} of what the "
                f"{end} end says, but {_range(average)} of them on average: "
                "raise eta or lower share"
            )
        return where


def optimal_eps(
    x_t: Tensor,
    t: Tensor,
    process: NoiseProcess,
    items: Tensor,
    scaled: Callable[[Tensor], Tensor],
) -> Tensor:
    """eps* [B, D] of x_t [B, D] float64 at t [B], on x_t's device.

        eps* = (x_t - alpha sum_i w_i y_i) / sigma,
        w = softmax_i(-|x_t - alpha y_i|^2 / (2 sigma^2))

    (arXiv 2206.00364, appendix B.3) over the items y_i [N, ...], made by `scaled` some at a time:
    memory does not grow with N, as that of `ExactDenoiser` does.
    """
    alpha, sigma = (expand(c, x_t) for c in process.alpha_sigma(t))
    top, total, mean = torch.full_like(sigma, -torch.inf), torch.zeros_like(sigma), 0.0
    for part in items.split(_rows(items)):
        y = _flat(part, scaled)
        # log w up to a constant of the row: x^2 is the same for all items.
        logits = (alpha / sigma.square() * x_t) @ y.T
        logits -= (alpha / sigma).square() / 2 * y.square().sum(1)
        peak = torch.maximum(top, logits.amax(1, keepdim=True))
        weights, kept = logits.sub_(peak).exp_(), (top - peak).exp()
        total = total * kept + weights.sum(1, keepdim=True)
        mean, top = mean * kept + weights @ y, peak
    return (x_t - alpha * mean / total) / sigma


def _mean(items: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the data, [D] float64."""
    return sum(_flat(part, scaled).sum(0) for part in items.split(_rows(items))) / len(items)


def _rows(items: Tensor) -> int:
    """How many items at a time; never many more than pairs of them with all triples can be held."""
    return max(1, VALUES // max(items[0].numel(), ROWS))


def _flat(items: Tensor, scaled: Callable[[Tensor], Tensor]) -> Tensor:
    """x0 [B, D] float64, where we compute."""
    return scaled(items.to(default_device())).flatten(1).double()


def _range(y: np.ndarray) -> str:
    return f"{y.min():.3g} to {y.max():.3g}"


def _running(y: np.ndarray) -> np.ndarray:
    """The mean of the first 1, 2, .. values."""
    return y.cumsum() / np.arange(1, len(y) + 1)
