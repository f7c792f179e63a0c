"""Our training step of DiT-S/2 against the plain way, alternating in one run.

Ours: what ``fit`` runs in bf16-mixed (both losses, label dropout), with fused AdamW and one
multi-tensor EMA update; --compile adds the same with compiled blocks, for a CUDA device. Plain: the
same network, its fused attention included, in float32, one loss, with AdamW and EMA parameter by
parameter. A ratio is of neighbouring steps; it depends on the bf16 of the processor.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from ours import fit_step
from torch import Tensor
from train_step import DECAY, seconds

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.methods.single import Diffusion
from expertdiff.networks.dit import DiT

FLOPS = 6.056e9 * 2 * 3
"""A sample and step: two a multiply-add, and the backward pass costs two forward ones."""


def plain_step(latents: Tensor, labels: Tensor) -> Callable[[], None]:
    net = DiT(size="S").to(latents.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0, foreach=False)
    ema = [p.detach().clone() for p in net.parameters()]
    t = torch.randint(1000, labels.shape, device=labels.device)
    target = torch.randn_like(torch.cat([latents, latents], dim=1))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(net(latents, t, labels), target).backward()
        optimizer.step()
        for average, parameter in zip(ema, net.parameters()):
            average.mul_(DECAY).add_(parameter.detach(), alpha=1 - DECAY)

    return step


def our_step(latents: Tensor, labels: Tensor, compiled: bool) -> Callable[[], None]:
    module = Diffusion(
        network=DiT(size="S", compiled=compiled),
        process=DiscreteVP(LinearBetas()),
        prediction=Eps(),
        timesteps=Uniform(),
        weighting=Simple(),
        partition=Partition([0, 1]),
    ).to(latents.device)
    make = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0, fused=True)
    return fit_step(module, make, Batch(latents, labels, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="latents a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after two")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument(
        "--peak", type=float, default=989, help="bf16 TFLOP/s of a GPU (H100, H200)"
    )
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.compile and device == "cpu":
        parser.error("--compile needs a CUDA device: leave it out")
    torch.manual_seed(0)
    latents = torch.randn(args.batch, 4, 32, 32, device=device)
    labels = torch.randint(1000, (args.batch,), device=device)
    steps = {"plain": plain_step(latents, labels), "ours": our_step(latents, labels, False)}
    if args.compile:
        steps["compiled"] = our_step(latents, labels, True)
    times = {name: [] for name in steps}
    for _ in range(2 + args.steps):
        for name, step in steps.items():
            times[name].append(seconds(step, device))

    print(f"{device}, {torch.get_num_threads()} threads, batch {args.batch}, {args.steps} steps")
    kinds = ["wall", "processor"] if device == "cpu" else ["wall"]
    for name, rows in times.items():
        for kind, column, plain in zip(kinds, zip(*rows[2:]), zip(*times["plain"][2:])):
            median = statistics.median(column)
            ratios = sorted(p / ours for p, ours in zip(plain, column))
            rate = FLOPS * args.batch / median / 1e12
            use = f", {rate / args.peak:.1%} of the peak" if device == "cuda" else ""
            print(
                f"{name:8} {kind:9} {1 / median:7.2f} steps/s  {rate:7.3f} TFLOP/s{use}  "
                f"x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
