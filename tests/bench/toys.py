"""Training and sampling of 2-D models against the plain loop, interleaved in one run.

Plain: a DataLoader of tensors, float32, eager, AdamW and EMA parameter by parameter, a learning
rate that the host computes, `loss.item()` each step. Ours: `expertdiff fit`, its whole Lightning
loop, bfloat16, one seed or four side by side. The ratios are what counts.

    python tests/bench/toys.py --network MLPDenoiser --steps 400
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from expertdiff.cli import main as expertdiff
from expertdiff.data.densities import Moons
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDPM, SampleNoise
from expertdiff.experts.gated import GatedExperts
from expertdiff.experts.stacked import stack
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.tables.plan import Plan

CONFIG = Path(__file__).parents[2] / "configs/toys/dualdiff.yaml"
NETWORKS = {cls.__name__: cls for cls in (MLPDenoiser, GatedExperts)}
PROCESS = DiscreteVP(LinearBetas(), T=100)


def plain_training(network: nn.Module, steps: int) -> float:
    """Milliseconds a step."""
    points = torch.from_numpy(Moons().points("train", 100_000)).float()
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, foreach=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = [p.detach().clone() for p in network.parameters()]
    alpha, sigma = (c.float() for c in PROCESS.alpha_sigma(torch.arange(100)))
    done = 0
    while True:
        for (x0,) in loader:
            if done == 20:  # warm by now
                began = time.perf_counter()
            t, eps = torch.randint(100, (len(x0),)), torch.randn_like(x0)
            x_t = alpha[t, None] * x0 + sigma[t, None] * eps
            loss = (network(x_t, t) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5, foreach=False)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, p in zip(average, network.parameters()):
                    mean.mul_(0.995).add_(p, alpha=0.005)
            loss.item()
            done += 1
            if done == 20 + steps:
                return 1000 * (time.perf_counter() - began) / steps


def bare_training(network: nn.Module, steps: int, *seeds: int) -> float:
    """Milliseconds a step of the network's own work in bfloat16, which no loop can go below.

    `seeds` is how many networks lie side by side, where they do.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)
    shape = (*seeds, 256)
    x_t, eps, t = torch.randn(*shape, 2), torch.randn(*shape, 2), torch.randint(100, shape)
    for i in range(20 + steps):
        if i == 20:
            began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            output = network(x_t, t)
        optimizer.zero_grad()
        (output.float() - eps).square().mean().backward()
        optimizer.step()
    return 1000 * (time.perf_counter() - began) / steps


def our_training(config: Path, steps: int, *options: str) -> float:
    """Milliseconds a step: of the second half of a run, when it is warm."""
    with TemporaryDirectory() as root:
        options = [
            "fit", f"--config={config}", f"--trainer.default_root_dir={root}",
            f"--study.iterations={2 * steps}", "--trainer.logger=JsonLines",
            "--trainer.callbacks=[LossByInterval]", "--trainer.limit_val_batches=0",
            f"--trainer.log_every_n_steps={steps}", "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false", f"--checkpoint.every_n_steps={2 * steps}",
            *options,
        ]  # fmt: skip
        if code := expertdiff(options):
            raise SystemExit(code)
        lines = (Path(root) / "metrics.jsonl").read_text().splitlines()
        return 1000 / json.loads(lines[-1])["steps_per_second"]


def fixed_training(steps: int) -> float:
    """Milliseconds a step of the `fixed` preset's network, one seed."""
    with TemporaryDirectory() as folder:
        ((cell,),) = Plan("fixed", Path(folder), ["moons"], ["single-256"], seeds=[0]).groups()
        config = Path(folder) / "cell.yaml"
        config.write_text(json.dumps(cell.config))
        return our_training(config, steps)


@torch.no_grad()
def plain_sampling(network: nn.Module, samples: int) -> float:
    """Seconds for 10,000 points: float32, a t for every point, coefficients by indexing."""
    beta, alpha_bar = PROCESS.betas.float(), PROCESS.alpha_bar.float()
    began = time.perf_counter()
    x = torch.randn(samples, 2)
    for i in reversed(range(100)):
        t = torch.full((samples,), i)
        eps = network(x, t)
        x = (x - (beta / (1 - alpha_bar).sqrt())[t, None] * eps) / (1 - beta[t, None]).sqrt()
        if i:
            variance = beta * (1 - alpha_bar.roll(1)) / (1 - alpha_bar)
            x = x + variance[t, None].sqrt() * torch.randn_like(x)
    return time.perf_counter() - began


@torch.no_grad()
def our_sampling(network: nn.Module, samples: int) -> float:
    """Seconds for 10,000 points."""
    denoiser = NetworkDenoiser(network, PROCESS, Eps())
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        for index in torch.arange(samples).split(2500):
            DDPM(clip=False)(denoiser, SampleNoise(0, index.tolist(), (2,), "cpu"))
    return time.perf_counter() - began


def show(what: str, unit: str, plain: list[float], ours: dict[str, list[float]]) -> None:
    print(f"{what}: plain {statistics.median(plain):.2f} {unit}")
    for name, values in ours.items():
        ratios = [a / b for a, b in zip(plain, values)]
        print(
            f"  {name}: {statistics.median(values):.2f} {unit}, {statistics.median(ratios):.2f} "
            f"times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="MLPDenoiser")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    build = NETWORKS[args.network]
    names = (
        "one seed", "four seeds side by side, each", "fixed preset, batch 1024",
        "nothing but forward, backward and optimizer", "the same of four side by side, each",
    )  # fmt: skip
    plain, ours = [], {name: [] for name in names}
    drawn_plainly, drawn = [], {"expertdiff": []}
    for _ in range(args.runs):
        plain.append(plain_training(build(), args.steps))
        network = f"--model.network={args.network}"
        one, four = (
            our_training(CONFIG, args.steps, network, f"--model.seeds={seeds}")
            for seeds in ("null", "[0,1,2,3]")
        )
        fixed, bare = fixed_training(args.steps), bare_training(build(), args.steps)
        stacked = bare_training(stack([build() for _ in range(4)]), args.steps, 4)
        for name, value in zip(names, (one, four / 4, fixed, bare, stacked / 4)):
            ours[name].append(value)
        drawn_plainly.append(plain_sampling(build(), args.samples))
        drawn["expertdiff"].append(our_sampling(build(), args.samples))
    show("training, a step", "ms", plain, ours)
    show(f"sampling {args.samples:,} points", "s", drawn_plainly, drawn)


if __name__ == "__main__":
    main()
