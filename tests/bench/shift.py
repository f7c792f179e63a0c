"""How much of a model's FD-pixels is a shift of the mean image, and of its brightness alone.

The Frechet distance is |mean_a - mean_b|^2, and what covariances add. Samples are those that the
bundles were tested with, by sampler, seeds and precision:

    python tests/bench/shift.py runs/adm-0/bundles/baseline runs/adm-0/bundles/stitched
"""

import argparse
from pathlib import Path

import torch
import yaml

from expertdiff.analysis.mixes import LOW
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import build
from expertdiff.diffusion.samplers import Sampler
from expertdiff.evaluation.features import Pixels
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.evaluation.kinds import kind
from expertdiff.methods.stitched import Evaluation


def parts(drawn: Statistics, real: Statistics) -> torch.Tensor:
    """The whole distance, the part of the mean image, and of that the part of its brightness."""
    shift = drawn.mean - real.mean
    mean, brightness = shift.square().sum().item(), len(shift) * shift.mean().item() ** 2
    return torch.tensor([frechet_distance(drawn, real), mean, brightness])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    args = parser.parse_args()
    judge = Pixels()
    for folder in args.bundles:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        data = build(config["data"], Data)
        told = config["model"]["init_args"]["evaluation"]
        sampler, seeds = build(told["sampler"], Sampler), tuple(told["seeds"])
        evaluation = Evaluation(sampler, judge, told["samples"], seeds)
        identity, low = data.identity(), LOW.get(config["trainer"]["precision"])
        denoiser = Bundle.load(folder).denoiser
        real = Statistics.of(judge(data.real("reference")))
        found = []
        for seed in evaluation.seeds:
            drawn = []
            for index in torch.arange(evaluation.samples).split(evaluation.batch_size):
                with torch.autocast("cpu", low, enabled=low is not None):
                    samples = evaluation.draw(denoiser, kind(identity), data.shape, seed, index)
                drawn.append(judge(samples))
            found.append(parts(Statistics.of(torch.cat(drawn)), real))
        whole, mean, brightness = torch.stack(found).mean(0).tolist()
        print(
            f"{folder}: {judge.metric} {whole:.3f}, of the mean image {mean:.3f}, of its "
            f"brightness {brightness:.3f}, the rest {whole - mean:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
