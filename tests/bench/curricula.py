"""Which t are drawn and what their losses count, each against its control (docs/curricula.md).

A small network on scikit-learn's 8 x 8 digits, three training seeds side by side, equal steps. What
was measured before is kept in the output folder and not measured again.

    python tests/bench/curricula.py --output runs/curricula
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from expertdiff.bundle import Expert
from expertdiff.cli import main as expertdiff
from expertdiff.data.images import Digits
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.evaluation.features import Pixels
from expertdiff.files import read_json, write_json
from expertdiff.image_files import to_uint8
from expertdiff.networks.mlp import Residual
from expertdiff.networks.network import Network

CONFIG = Path(__file__).parents[2] / "configs/digits/mdm.yaml"
PROCESS = DiscreteVP(CosineBetas(), T=1000)
PARTITION = Partition([0, 0.1, 0.8, 1])
TRAINING, SAMPLING = (0, 1, 2), (0, 1)

VARIANTS = {
    "uniform": ["--model=Diffusion"],
    "LowDiscrepancy": ["--model=Diffusion", "--model.timesteps=LowDiscrepancy"],
    "CLTS": ["--model=Diffusion", "--model.timesteps=CLTS"],
    "its density as a weight": [
        "--model=Diffusion",
        "--model.timesteps=CLTS",
        "--model.timesteps.as_weight=true",
    ],
    "MinSNR": ["--model=Diffusion", "--model.weighting=MinSNR"],
    "P2": ["--model=Diffusion", "--model.weighting=P2"],
    "Uncertainty (ANT-UW)": ["--model=Uncertainty"],
    "weights 1 / L_i": ["--model=Uncertainty", "--model.fixed={losses}"],
    "MDLRC": ["--model=Diffusion", "--trainer.callbacks+=MDLRC"],
    "its learning rate alone": [
        "--model=Diffusion",
        "--trainer.callbacks+=MDLRC",
        "--trainer.callbacks.momentum=false",
    ],
}


class Flat(Network):
    """Linear layers on the pixels of 8 x 8 grey images, [..., 1, 8, 8], and on t [...]."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(1e4) * torch.arange(32) / 31)
        self.register_buffer("frequencies", frequencies, persistent=False)
        layers = [Residual(width) for _ in range(depth)]
        self.body = nn.Sequential(nn.Linear(128, width), *layers, nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angle = t.float().unsqueeze(-1) * self.frequencies
        z = torch.cat([x_t.flatten(-3), angle.sin(), angle.cos()], dim=-1)
        return self.body(z).unflatten(-1, (1, 8, 8))


def train(
    name: str,
    options: Sequence[str],
    steps: int,
    output: Path,
    seeds: Sequence[int] | None = TRAINING,
    config: Path = CONFIG,
    network: str = "curricula.Flat",
) -> Path:
    """The folder of a run that trained these seeds side by side, or the one of its options."""
    folder = output / name.replace("/", "over").replace(" ", "-")
    arguments = [
        "fit", f"--config={config}", *options, f"--trainer.default_root_dir={folder}",
        f"--model.seeds={json.dumps(seeds)}", f"--model.network={network}",
        f"--trainer.max_steps={steps}", "--trainer.logger=JsonLines", "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", f"--checkpoint.every_n_steps={steps}",
    ]  # fmt: skip
    if code := expertdiff(arguments):
        raise SystemExit(code)
    return folder


def measured(folder: Path, samples: int) -> list[dict[str, list[float]]]:
    """Of each training seed: losses by interval, and the distance by sampling seed."""
    return [judged(Expert.read(folder, seed).denoiser(), samples) for seed in TRAINING]


def judged(denoiser: Denoiser, samples: int) -> dict[str, list[float]]:
    """Losses by interval, and the distance by sampling seed."""
    return {"FD": distances(denoiser, samples), "loss": by_interval(denoiser, Digits())}


@torch.no_grad()
def distances(denoiser: Denoiser, samples: int, steps: str = "ddim25") -> list[float]:
    """From held-out digits, one a sampling seed."""
    data, judge, found = Digits(), Pixels(), []
    reference = judge.real(data.real("validation"), torch.device("cpu"))
    for seed in SAMPLING:
        noise = SampleNoise(seed, range(samples), data.shape, "cpu")
        drawn = judge(to_uint8(DDIM(steps)(denoiser, noise)))
        found.append(judge.distances(judge.summary(drawn), reference)[judge.metric])
    return found


@torch.no_grad()
def by_interval(denoiser: Denoiser, data: Digits) -> list[float]:
    """The mean squared error of eps in each interval, at the same t and noise for all."""
    x0 = data.scaled(data.split("validation")[0])
    eps = SampleNoise(0, range(len(x0)), data.shape, "cpu")(0)
    u = (torch.arange(len(x0), dtype=torch.float64) + 0.5) / len(x0)
    losses = []
    for interval in PARTITION.intervals():
        t = PROCESS.times(u, interval)
        losses.append((denoiser(PROCESS.add_noise(x0, eps, t), t).eps - eps).square().mean().item())
    return losses


def spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def row(name: str, results: list[dict[str, list[float]]]) -> str:
    lengths = [i.hi - i.lo for i in PARTITION.intervals()]
    by_seed = [result["loss"] for result in results]
    whole = [sum(n * loss for n, loss in zip(lengths, losses)) for losses in by_seed]
    cells = [spread([mean(result["FD"]) for result in results], 3)]
    cells.append(f"{mean([stdev(result['FD']) for result in results]):.3f}")
    cells += [spread(values, 4) for values in [*zip(*by_seed), whole]]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/curricula"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.output / f"results-{args.steps}-{args.samples}.json"
    results = read_json(path) if path.is_file() else {}
    for name, options in VARIANTS.items():
        if name not in results:
            uniform = results.get("uniform", [])
            losses = [mean(values) for values in zip(*(r["loss"] for r in uniform))]
            options = [o.replace("{losses}", json.dumps(losses)) for o in options]
            folder = train(name, options, args.steps, args.output / str(args.steps))
            results[name] = measured(folder, args.samples)
            write_json(path, results)
        print(row(name, results[name]), flush=True)


if __name__ == "__main__":
    main()
