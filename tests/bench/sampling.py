"""What routing costs: sampling with a stitched bundle against the single network.

``python tests/bench/sampling.py`` draws the same images with one network and with three copies of
it behind a partition, in turn, and prints the ratio of the medians. The bar is 1.03.
"""

import argparse
import copy
import statistics
import time

import torch

from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.experts.routed import RoutedExperts
from expertdiff.networks.unet import ADMUNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", default="ddim50")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    process = DiscreteVP(CosineBetas())
    network = ADMUNet(32, model_channels=64, num_res_blocks=1, learn_sigma=False)
    network = network.to(args.device, memory_format=torch.channels_last)
    single = NetworkDenoiser(network, process, Eps()).to(args.device)
    experts = [copy.deepcopy(single) for _ in range(3)]
    stitched = RoutedExperts(experts, Partition([0, 0.1, 0.8, 1]))
    noise = SampleNoise(0, range(args.images), (3, 32, 32), args.device)
    sampler, seconds = DDIM(args.steps), {"single": [], "stitched": []}
    for run in range(args.runs + 1):
        images = {}
        for name, denoiser in (("single", single), ("stitched", stitched)):
            began = time.perf_counter()
            images[name] = sampler(denoiser, noise).cpu()
            if run:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
        assert torch.equal(images["single"], images["stitched"])
    for name, values in seconds.items():
        print(
            f"{name:>9}: {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}"
        )
    pairs = [b / a for a, b in zip(seconds["single"], seconds["stitched"])]
    print(f"stitched / single: {statistics.median(pairs):.4f} (bar: at most 1.03)")


if __name__ == "__main__":
    main()
