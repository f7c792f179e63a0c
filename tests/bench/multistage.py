"""Multi-stage against its controls, at equal training FLOPs: a row a model.

    python tests/bench/multistage.py moons            # points of the plane, residual MLPs
    python tests/bench/multistage.py digits           # 8 x 8 digits, ADM UNets

The same chain, edges, batch and optimizer for all; the learning rate falls to 0 by a cosine. Trains
in a plain loop, a model and seed after another; rows that `--output` holds are not computed again.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from expertdiff.data.base import Data
from expertdiff.data.densities import Moons
from expertdiff.data.images import Digits
from expertdiff.data.toys import Toy2D
from expertdiff.diffusion.denoiser import Denoiser, Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP, QuadraticBetas
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.diffusion.timesteps import Staged, Step, TimestepSampler, Uniform
from expertdiff.evaluation.features import Pixels
from expertdiff.evaluation.kinds import kind
from expertdiff.evaluation.points import sliced_wasserstein
from expertdiff.experts.multistage import MultiStage
from expertdiff.experts.routed import RoutedExperts
from expertdiff.experts.size import active, stored
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.network import Network
from expertdiff.networks.unet import ADMUNet
from expertdiff.seeds import generator

WHOLE = Interval()


class Setting:
    """What is trained on, and the networks of any width."""

    def __init__(self, name: str) -> None:
        self.points = name == "moons"
        self.data: Data = Toy2D(Moons(), samples=10_000) if self.points else Digits()
        betas = QuadraticBetas(last=0.2) if self.points else CosineBetas()
        self.process = DiscreteVP(betas, 100 if self.points else 1000)
        edges = [0, 0.3, 0.6, 1] if self.points else [0, 0.1, 0.8, 1]
        self.partition = Partition(edges)
        self.batch, self.width = (256, 64) if self.points else (64, 16)
        self.widths = (96, 64, 32) if self.points else (24, 16, 8)
        self.wider = 97 if self.points else 28  # with about as many parameters as all stages

    def network(self, width: int, decoder: int | None = None) -> Network:
        """A plain one."""
        if self.points:
            return MLPDenoiser(width, scale=100, decoder_width=decoder)
        return ADMUNet(
            8, in_channels=1, model_channels=width, num_res_blocks=1, channel_mult=(1, 2),
            attention_resolutions=(4,), num_head_channels=8, learn_sigma=False,
            decoder_width=decoder,
        )  # fmt: skip

    def of(self, network: Network) -> Denoiser:
        """A denoiser of the chain."""
        return NetworkDenoiser(network, self.process, Eps())

    def flops(self, denoiser: Denoiser) -> float:
        """Of a training item, forward, where each interval is drawn alike."""
        parts = active(denoiser, self.data.shape)
        return sum(part.flops for part in parts) / len(parts)


def train(
    s: Setting, network: Network, steps: int, interval: Interval, t: TimestepSampler, key: tuple
) -> Denoiser:
    """The denoiser of a network after so many steps."""
    denoiser, items = s.of(network), s.data.scaled(s.data.split("train")[0])
    t.prepare(s.process, interval, s.partition)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0, fused=True)
    scheduler = CosineAnnealingLR(optimizer, steps)
    g = generator("cpu", *key)
    for _ in range(steps):
        x0 = items[torch.randint(len(items), (s.batch,), generator=g)]
        at, _ = t.sample(s.batch, interval, g, s.process, Step(g))
        eps = torch.randn(x0.shape, generator=g)
        output = denoiser.output(s.process.add_noise(x0, eps, at).float(), at, None)
        optimizer.zero_grad()
        (output - eps).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return denoiser.eval().requires_grad_(False)


def models(s: Setting, steps: int) -> dict[str, Callable[[int], tuple[Denoiser, int, float]]]:
    """Each trains with a seed; gives the model, its steps, and its training FLOPs (forward)."""
    n, base = len(s.partition), s.flops(s.of(s.network(s.width)))

    def unified(width: int, sampler: type[TimestepSampler], k: float) -> Callable:
        def run(seed: int) -> tuple[Denoiser, int, float]:
            torch.manual_seed(seed)
            net, own = s.network(width), round(steps * k)
            cost = s.flops(s.of(net)) * own * s.batch
            return train(s, net, own, WHOLE, sampler(), (seed, "all")), own, cost

        return run

    def separate(widths: tuple, k: float) -> Callable:
        def run(seed: int) -> tuple[Denoiser, int, float]:
            experts, cost, own = [], 0.0, round(steps * k / n)
            for i, (interval, width) in enumerate(zip(s.partition.intervals(), widths)):
                torch.manual_seed(seed * n + i)
                net = s.network(s.width, width)
                cost += s.flops(s.of(net)) * own * s.batch
                experts.append(train(s, net, own, interval, Uniform(), (seed, i)))
            return RoutedExperts(experts, s.partition), own * n, cost

        return run

    def together(probs: str) -> Callable:
        def run(seed: int) -> tuple[Denoiser, int, float]:
            torch.manual_seed(seed)
            net = stages()
            own = round(steps * base / mean)
            sampler = Staged(probs)
            return train(s, net, own, WHOLE, sampler, (seed, "all")), own, mean * own * s.batch

        return run

    def stages() -> MultiStage:
        return MultiStage(s.network(s.width), s.widths, s.partition, s.process.T)

    mean, wide = s.flops(s.of(stages())), s.flops(s.of(s.network(s.wider)))
    return {
        "unified": unified(s.width, Uniform, 1),
        "unified, t as multi-stage": unified(s.width, Staged, 1),
        "unified, parameters as multi-stage": unified(s.wider, Uniform, base / wide),
        "separate": separate((None,) * n, 1),
        "separate, tailored width": separate(s.widths, base / mean),
        "multi-stage": together("uniform"),
    }


def losses(s: Setting, denoiser: Denoiser) -> list[float]:
    """The mean squared error of eps in each interval, at a fixed t and eps an item."""
    x0 = s.data.scaled(s.data.split("validation")[0])[:2000]
    eps = torch.randn(x0.shape, generator=generator("cpu", "validation"))
    u = (torch.arange(len(x0)) + 0.5) * (math.sqrt(5) - 1) / 2 % 1
    found = []
    for interval in s.partition.intervals():
        t = s.process.times(u, interval)
        out = denoiser(s.process.add_noise(x0, eps, t).float(), t).eps
        found.append((out - eps).square().mean().item())
    return found


def distances(s: Setting, denoiser: Denoiser, samples: int, seeds: int) -> list[float]:
    """Of samples from held-out items, for each sampling seed: sliced W1 of points, FD of pixels."""
    real, drawn = s.data.real("validation"), []
    for seed in range(seeds):
        noise = SampleNoise(seed, range(samples), s.data.shape, "cpu")
        x = DDIM(steps=20, clip=not s.points)(denoiser, noise, None)
        items = kind(s.data.identity()).finished(x)
        if s.points:
            drawn.append(sliced_wasserstein(real.numpy(), items.numpy()))
        else:
            judge, cpu = Pixels(), torch.device("cpu")
            ours, theirs = judge.summary(judge(items)), judge.real(real, cpu)
            drawn.append(judge.distances(ours, theirs)[judge.metric])
    return drawn


def main() -> None:
    """A JSON line a model and seed, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", choices=["moons", "digits"])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-multistage.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    s = Setting(args.data)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.touch()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()]
    for seed in range(args.seeds):
        for name, run in models(s, args.steps).items():
            key = {"data": args.data, "model": name, "seed": seed, "steps": args.steps}
            if any(key.items() <= row.items() for row in rows):
                continue
            denoiser, own, flops = run(seed)
            row = key | {
                "own_steps": own, "GFLOPs": 3 * flops / 1e9, "stored": stored(denoiser),
                "losses": losses(s, denoiser),
                "distances": distances(s, denoiser, args.samples, 3),
            }  # fmt: skip
            rows.append(row)
            with open(args.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    table(s, [row for row in rows if row["data"] == args.data and row["steps"] == args.steps])


def table(s: Setting, rows: list[dict]) -> None:
    """Mean and standard deviation over training seeds."""
    lengths = [interval.hi - interval.lo for interval in s.partition.intervals()]

    def told(values: list[float]) -> str:
        v = torch.tensor(values, dtype=torch.float64)
        return f"{v.mean():.4f} ± {v.std():.4f}"

    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        parts = [told([row["losses"][i] for row in mine]) for i in range(len(lengths))]
        whole = told([sum(a * b for a, b in zip(lengths, row["losses"])) for row in mine])
        far = told([sum(row["distances"]) / 3 for row in mine])
        floor = sum(torch.tensor(row["distances"]).std().item() for row in mine) / len(mine)
        first = mine[0]
        cells = [f"{first['stored'] / 1e3:.0f}k", first["own_steps"], f"{first['GFLOPs']:.1f}"]
        print(
            "| " + " | ".join(map(str, [name, *cells, *parts, whole, far, f"{floor:.4f}"])) + " |"
        )


if __name__ == "__main__":
    main()
