"""A flow in front of the diffusion against none, at equal steps and equal time (docs/indm.md).

The shipped config on two sets of the plane, three training seeds side by side. The control is the
same program with an identity flow; its second run takes as much processor time as INDM's. What was
measured before is kept in the output folder and not measured again.

    python tests/bench/indm.py --output runs/bench-indm
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from curricula import SAMPLING, TRAINING, spread
from torch import Tensor

from expertdiff.bundle import Expert
from expertdiff.cli import main as expertdiff
from expertdiff.data.densities import Density, Moons, Pinwheel
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.exact import ExactDenoiser
from expertdiff.diffusion.process import VPSDE
from expertdiff.diffusion.samplers import DDPM, SampleNoise
from expertdiff.evaluation.cloud import PointCloud
from expertdiff.evaluation.likelihood import log_likelihood
from expertdiff.files import read_json, write_json

CONFIG = Path(__file__).parents[2] / "configs/toys/indm.yaml"
SETS = {"Moons": Moons(), "Pinwheel": Pinwheel()}
LIKELIHOODS = 500
"""Held-out points whose likelihood is taken."""


def train(density: str, depth: int, steps: int, folder: Path) -> float:
    """Seconds of the processor for all seeds; those of the clock depend on who else is there."""
    options = [
        "fit", f"--config={CONFIG}", f"--data.density={density}",
        f"--trainer.default_root_dir={folder}", f"--model.network.flow.depth={depth}",
        f"--model.seeds={list(TRAINING)}", f"--trainer.max_steps={steps}",
        "--trainer.logger=JsonLines", "--trainer.callbacks=[LossByInterval]",
        "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        f"--checkpoint.every_n_steps={steps}",
    ]  # fmt: skip
    began = time.process_time()
    if code := expertdiff(options):
        raise SystemExit(code)
    return time.process_time() - began


def held_out(density: Density, n: int) -> Tensor:
    return torch.from_numpy(density.points("validation", n)).float()


def nll(denoiser: Denoiser, density: Density) -> list[float]:
    """Bits of each held-out point."""
    return (-log_likelihood(denoiser, held_out(density, LIKELIHOODS))).tolist()


def distances(denoiser: Denoiser, density: Density, samples: int, seed: int) -> dict[str, float]:
    noise = SampleNoise(seed, range(samples), (2,), "cpu")
    drawn, judge = DDPM(100, clip=False)(denoiser, noise), PointCloud()
    found = judge.distances(judge.summary(drawn), judge.summary(held_out(density, samples)))
    return {name: found[name] for name in ("KL", "reverse KL")}


def measured(folder: Path, density: Density, samples: int) -> list[dict]:
    """Of each training seed: the bits of each point, and the distances by sampling seed."""
    results = []
    for training in TRAINING:
        denoiser = Expert.read(folder, training).denoiser()
        drawn = [distances(denoiser, density, samples, seed) for seed in SAMPLING]
        x = held_out(density, samples)
        with torch.no_grad():
            back = (denoiser.to_data(denoiser.from_data(x)[0]) - x).abs().max().item()
        results.append({"bits": nll(denoiser, density), "drawn": drawn, "inverse error": back})
    return results


def floor(density: Density, samples: int) -> dict:
    """What the density itself would score."""
    judge, fresh = PointCloud(), torch.from_numpy(density.points("train", samples))
    found = judge.distances(judge.summary(fresh), judge.summary(held_out(density, samples)))
    exact = ExactDenoiser(density.mixture(), VPSDE())
    return {"bits": nll(exact, density)} | found


def row(name: str, result: dict, control: dict) -> str:
    """Mean and standard deviation over training seeds, and the floors."""
    seeds = result["seeds"]
    bits = [mean(seed["bits"]) for seed in seeds]
    apart = [b - mean(seed["bits"]) for b, seed in zip(bits, control["seeds"])]
    cells = [f"{result['steps']:,}", f"{result['seconds']:.0f}"]
    cells += [spread(bits, 3), spread(apart, 3) if result is not control else ""]
    for key in ("KL", "reverse KL"):
        cells.append(spread([mean(drawn[key] for drawn in seed["drawn"]) for seed in seeds], 3))
        cells.append(f"{mean(stdev(d[key] for d in seed['drawn']) for seed in seeds):.3f}")
    return f"| {name} | {' | '.join(cells)} |"


def study(density: str, steps: int, samples: int, output: Path, kept: Callable) -> None:
    """Trains and measures the three models of one set, and prints their rows."""

    def model(name: str, depth: int, n: int) -> dict:
        folder = output / density / f"{name}-{n}"

        def run() -> dict:
            seconds = train(density, depth, n, folder)
            seeds = measured(folder, SETS[density], samples)
            return {"seconds": seconds, "steps": n, "seeds": seeds}

        return kept(f"{density} {name} {steps}", run)

    exact = kept(f"{density} floor", lambda: floor(SETS[density], samples))
    print(f"{density}: the density {mean(exact['bits']):.3f} bits; fresh points "
          f"KL {exact['KL']:.3f}, reverse {exact['reverse KL']:.3f}")  # fmt: skip
    control = model("control", 0, steps)
    print(row("identity flow", control, control), flush=True)
    indm = model("indm", 8, steps)
    print(row("INDM", indm, control), flush=True)
    longer = model("longer", 0, round(steps * indm["seconds"] / control["seconds"]))
    print(row("identity flow, equal time", longer, control), flush=True)
    worst = max(seed["inverse error"] for seed in indm["seeds"])
    print(f"largest |h^-1(h(x)) - x|: {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bench-indm"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=2500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.output / "results.json"
    results = read_json(path) if path.is_file() else {}

    def kept(key: str, run: Callable[[], dict]) -> dict:
        if key not in results:
            results[key] = run()
            write_json(path, results)
        return results[key]

    for density in args.sets:
        study(density, args.steps, args.samples, args.output, kept)


if __name__ == "__main__":
    main()
