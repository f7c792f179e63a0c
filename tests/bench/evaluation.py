"""Inception features and Frechet distances, ours against the usual, interleaved in one run.

Features: the folded, channels-last network, pool_3 and the spatial features of sFID, against
torch-fidelity's, which gives pool_3 alone. The bar is 1.5 times as fast at features equal to 1e-4.
Distances: of statistics of 2,048 dimensions, against scipy.linalg.sqrtm. The bar is 5 times.

    EXPERTDIFF_DATA=DIR python tests/bench/evaluation.py

DIR holds torch-fidelity's ``weights-inception-2015-12-05-*.pth`` and ``cifar-10-batches-bin``.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from expertdiff.data.images import CIFAR10
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.evaluation.inception import Inception


def by_matrix_root(a: Statistics, b: Statistics) -> float:
    """The distance by its definition."""
    root = np.trace(scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real)
    traces = a.cov.trace() + b.cov.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * root).item()


def timed(calls: dict[str, Callable[[], Any]], runs: int, device: str) -> dict[str, Any]:
    """Runs the calls in turn, prints times and ratios; returns what they gave."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    results = {}
    for run in range(runs + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            if device == "cuda":
                torch.cuda.synchronize()
            if run:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, times in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*times))
        print(f"  {name}: {wall:.2f} s, {cpu:.2f} s of processor time")
    ours, theirs = seconds.values()
    for i, clock in enumerate(("", " (of processor time, where others share the cores)")):
        ratios = [b[i] / a[i] for a, b in zip(ours, theirs)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  ratio: {statistics.median(ratios):.2f}, {spread}{clock}")
    return results


def features(images: Tensor, weights: Path, runs: int, device: str) -> None:
    network = FeatureExtractorInceptionV3("theirs", ["2048"], str(weights)).to(device)
    judge, images = Inception(weights), images.to(device)
    calls = {"ours": lambda: judge(images), "torch-fidelity": lambda: network(images)[0]}
    print(f"features of {len(images)} images, bar 1.5")
    found = timed(calls, runs, device)
    apart = (found["ours"][:, :2048] - found["torch-fidelity"]).abs().max().item()
    print(f"  pool_3 apart by at most {apart:.1e} (bar: 1e-4)")


def distances(count: int, runs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2048, 2048, generator=generator) / 45 * torch.logspace(0, -1, 2048)
    sets = (torch.randn(count, 2048, generator=generator) @ mixing for _ in range(2))
    pair = [Statistics.of(x) for x in sets]
    print(f"distance of statistics of {count} features of 2048 dimensions, bar 5")
    calls = {"ours": lambda: frechet_distance(*pair), "sqrtm": lambda: by_matrix_root(*pair)}
    found = timed(calls, runs, "cpu")
    print(f"  {found['ours']:.9g} and {found['sqrtm']:.9g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="features of the statistics")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if "EXPERTDIFF_DATA" not in os.environ:
        parser.error("EXPERTDIFF_DATA names no folder with CIFAR-10 and Inception weights")
    torch.set_num_threads(args.threads)
    folder = Path(os.environ["EXPERTDIFF_DATA"]).expanduser()
    weights = next(folder.glob("weights-inception-2015-12-05-*.pth"))
    images = CIFAR10(folder, download=False).split("validation")[0][: args.images]
    print(f"{args.device}, {args.threads} threads")
    with torch.no_grad():
        features(images, weights, args.runs, args.device)
    distances(args.count, args.runs)


if __name__ == "__main__":
    main()
