"""Experts that began as one network, merged into one again (arXiv 2410.06664)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from tqdm import tqdm

from expertdiff.bundle import Bundle, Expert, Merger, check_data, check_output
from expertdiff.data.base import Data
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import NetworkDenoiser
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.evaluation.kinds import kind
from expertdiff.files import writable
from expertdiff.methods.base import validation_t
from expertdiff.methods.stitched import Evaluation

SEED = -1
"""Of the samples that shares are chosen by, which would flatter them in a test of the same."""

Score = Callable[[NetworkDenoiser], float]
"""A number of a network; the lower, the better."""


def merge(
    experts: list[Path],
    origin: Path,
    output: Path,
    shares: list[float] | None = None,
    data: Data | None = None,
    evaluation: Evaluation | None = None,
    loss_items: int = 2000,
    trials: int = 100,
    allow_unfinished: bool = False,
) -> None:
    """Make one network of experts that were trained from one network (Decouple-then-Merge).

    Args:
        experts: folders of training runs, checkpoints or files of bundles, of `Decoupled` or of any
            method with ``model.init_from``.
        origin: what that was.
        output: the bundle's folder.
        shares: how far to go towards each expert, in their order: 0 stays at the origin.
        data: to search the shares instead, on training items, so that held-out ones can judge.
        evaluation: search by the distance of samples drawn and judged so, not by the loss; by other
            sampling seeds than a test will have.
        loss_items: how many training items tell the loss, the first ones.
        trials: networks that the search may try.
        allow_unfinished: also take experts that were not trained to their end.
    """
    if (shares is None) == (data is None) or (evaluation and data is None):
        raise ValueError("give shares, or data to search them by: one of the two")
    first, *others = Expert.start(origin), *map(Expert.read, experts)
    merger = Merger(first, others, allow_unfinished)
    check_output(Path(output), [first, *others])
    if shares is None:
        check_data(first.path, first.identity["data"], data.identity())
        writable(Path(output))
        score = Samples(first, data, evaluation) if evaluation else Loss(data, loss_items)
        shares = search(merger, score, trials)
    for path, share in zip(experts, shares):
        print(f"{share:+.4f}  {path}")
    bundle = Bundle.write([merger.merged(shares)], output)
    print(f"bundle: {bundle.folder}")


def search(merger: Merger, score: Score, trials: int = 100) -> list[float]:
    """The shares of the network with the best score, by Nelder and Mead's simplex.

    Args:
        merger: what is merged.
        score: what to look for.
        trials: networks that are tried; the origin and the mean of the experts are the first two.
    """
    n, device = len(merger.experts), default_device()
    denoiser, tried = merger.origin.denoiser().to(device), {}
    bar = tqdm(total=trials, leave=False)

    def value(shares: Sequence[float]) -> float:
        denoiser.network.load_state_dict(merger.weights(shares))
        tried[tuple(map(float, shares))] = found = score(denoiser)
        bar.update()
        bar.set_postfix(best=f"{min(tried.values()):.5g}")
        return found

    mean = np.full(n, 1 / n)
    value(np.zeros(n))
    corners = np.vstack([mean, mean + 0.5 * np.eye(n)])
    options = {"initial_simplex": corners, "maxfev": max(trials - 1, 1)}
    minimize(value, mean, method="Nelder-Mead", options=options)
    bar.close()
    return list(min(tried, key=tried.get))


class Loss:
    """The mse of a network on training items, at fixed t and noise.

    Args:
        data: whose training items are asked about.
        items: how many; the first ones.

    Raises:
        ValueError: no items.
    """

    def __init__(self, data: Data, items: int) -> None:
        if items < 1:
            raise ValueError(f"items {items} tell no loss: give 1 or more")
        device = default_device()
        found, self.y = (part[:items].to(device) for part in data.split("train"))
        self.x0, self.index = data.scaled(found), torch.arange(len(found), device=device)
        self.eps = SampleNoise(0, self.index.tolist(), self.x0.shape[1:], device)(0)

    @torch.no_grad()
    def __call__(self, denoiser: NetworkDenoiser) -> float:
        process, parts = denoiser.process, []
        t = validation_t(process, self.index, Interval())
        for i in self.index.split(200):
            (x0, _), eps = denoiser.from_data(self.x0[i]), self.eps[i]
            y = self.y[i] if denoiser.network.num_classes else None
            prediction = denoiser(process.add_noise(x0, eps, t[i]), t[i], y)
            parts.append(losses(prediction, denoiser.prediction, process, x0, eps, t[i]).mse)
        return torch.cat(parts).double().mean().item()


class Samples:
    """The distance of a network's samples from training items.

    Args:
        origin: what the networks are.
        data: whose training items they are compared with.
        evaluation: how samples are drawn and judged.

    Raises:
        ValueError: it has no judge, or does not suit these samples.
    """

    def __init__(self, origin: Expert, data: Data, evaluation: Evaluation) -> None:
        if evaluation.judge is None:
            raise ValueError("the evaluation has no judge: name one, for example Pixels")
        self.evaluation, self.trained = evaluation, origin.identity["data"]
        self.kind, self.device = kind(self.trained), default_device()
        evaluation.check(self.kind, str(origin.path))
        self.judge = evaluation.judge.to(self.device)
        self.real = self.judge.real(data.real("train"), self.device)

    @torch.no_grad()
    def __call__(self, denoiser: NetworkDenoiser) -> float:
        e, shape = self.evaluation, tuple(self.trained["shape"])
        guided = e.guided(denoiser, self.trained).to(self.device)
        features = [
            self.judge(e.draw(guided, self.kind, shape, SEED, index))
            for index in torch.arange(e.samples).split(e.batch_size)
        ]
        summary = self.judge.summary(torch.cat(features))
        return self.judge.distances(summary, self.real)[self.judge.metric]
