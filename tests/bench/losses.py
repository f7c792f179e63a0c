"""Losses by interval of several bundles of one data set, on the same items, t and noise.

Others are told in per cent over the first:

    python tests/bench/losses.py runs/cifar10-dit/bundles/baseline runs/cifar10-remix/bundles/remix
"""

import argparse
from pathlib import Path

import torch
import yaml

from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import build
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.methods.base import validation_t


@torch.no_grad()
def mse(bundle: Bundle, data: Data, partition: Partition, samples: int) -> list[float]:
    """The mean squared error of each interval, over the first held-out items."""
    items, labels = (part[:samples] for part in data.split("validation"))
    means = []
    for interval in partition.intervals():
        total = 0.0
        for index in torch.arange(len(items)).split(250):
            x0, y = data.scaled(items[index]), labels[index] if bundle.num_classes else None
            eps = SampleNoise(0, index.tolist(), x0.shape[1:], "cpu")(0)
            process = bundle.denoiser.process
            t = validation_t(process, index, interval)
            told = bundle.denoiser(process.add_noise(x0, eps, t), t, y)
            kind = next(m.prediction for m in bundle.denoiser.modules() if hasattr(m, "prediction"))
            total += losses(told, kind, process, x0, eps, t).mse.sum().item()
        means.append(total / len(items))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", help="the first is what others divide by")
    parser.add_argument("--intervals", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    config = yaml.safe_load((args.bundles[0] / "config.yaml").read_text())["data"]
    data, first = build(config, Data), None
    partition = Partition([i / args.intervals for i in range(args.intervals + 1)])
    for path in args.bundles:
        found = mse(Bundle.load(path), data, partition, args.samples)
        first = first or found
        told = " ".join(f"{100 * (a / b - 1):+6.2f}" for a, b in zip(found, first))
        print(f"{path}: {sum(found) / len(found):.6f}, per cent over the first: {told}", flush=True)


if __name__ == "__main__":
    main()
