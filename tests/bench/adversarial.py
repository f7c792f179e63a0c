"""Training against a critic, each way beside its controls (docs/adversarial.md).

On eight Gaussians of the plane and on scikit-learn's 8 x 8 digits, three training seeds side by
side. Rows "in the time of" another train the plain program for as many more steps as that one takes
processor time. What was measured before is kept in the output folder and not measured again.

    python tests/bench/adversarial.py --output runs/adversarial
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import curricula
import torch
from curricula import PROCESS, SAMPLING, TRAINING, measured, spread
from torch import Tensor, nn

from expertdiff.bundle import Expert
from expertdiff.data.densities import Gaussians
from expertdiff.data.images import Digits
from expertdiff.data.toys import Toy2D
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.samplers import CAS, DDIM, DDPM, SampleNoise, Sampler
from expertdiff.evaluation.cloud import PointCloud
from expertdiff.evaluation.features import Pixels
from expertdiff.evaluation.points import mode_coverage
from expertdiff.files import read_json, write_json
from expertdiff.image_files import to_uint8
from expertdiff.methods.adversarial import relations
from expertdiff.networks.mlp import Residual
from expertdiff.networks.network import Network
from expertdiff.networks.unet import zero

PLANE = Path(__file__).parents[2] / "configs/toys/mdm.yaml"
POINTS = 1000


class FlatCritic(Network):
    """Linear layers on the pixels of 8 x 8 grey images, [..., 1, 8, 8]."""

    def __init__(self, width: int = 128, depth: int = 1, outputs: int = 1) -> None:
        super().__init__()
        layers, out = [Residual(width) for _ in range(depth)], nn.Linear(width, outputs)
        self.body = nn.Sequential(nn.Linear(64, width), *layers, nn.ReLU(), out)
        if outputs == 1:
            zero(out)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.body(x_t.flatten(-3))


class Variant(NamedTuple):
    """One row.

    Attributes:
        options: of ``fit``.
        like: it trains as long as this row, which has the steps of all others.
        plain: and this is the row of its own options.
    """

    options: list[str]
    like: str | None = None
    plain: str | None = None


def variants(
    critic: str, strengths: Sequence[float], structures: Sequence[float]
) -> dict[str, Variant]:
    """The rows at these strengths of ACSM and SADM-style; times are those of the last."""
    plain, one_t = ["--model=Diffusion"], ["--model=Diffusion", "--model.timesteps=OneForAll"]
    guided = ["--model=StructureGuided", "--model.timesteps=OneForAll", f"--model.critic={critic}"]
    guided.append("--model.critic.outputs=32")
    rows = {"plain": Variant(plain)}
    for strength in strengths:
        options = ["--model=ConsistentAdversarial", f"--model.critic={critic}"]
        rows[f"ACSM {strength:g}"] = Variant([*options, f"--model.strength={strength}"])
    last = f"ACSM {strengths[-1]:g}"
    rows["plain in the time of ACSM"] = Variant(plain, last, "plain")
    rows["one t"] = Variant(one_t)
    for strength in structures:
        options = [*guided, f"--model.strength={strength}"]
        rows[f"SADM-style {strength:g}"] = Variant(options)
        rows[f"SADM-style {strength:g}, psi frozen"] = Variant([*options, "--model.critic_lr=0"])
    last = f"SADM-style {structures[-1]:g}"
    rows["one t in the time of SADM-style"] = Variant(one_t, last, "one t")
    return rows


DIGITS_ROWS = variants("adversarial.FlatCritic", (1 / 32, 0.3), (0.1, 0.1 / 64))
PLANE_ROWS = variants("MLPLogit", (1.0, 0.1), (0.1, 0.01))


@torch.no_grad()
def on_plane(folder: Path) -> list[dict[str, Any]]:
    """Of each training seed: scores by sampling seed, and the mean loss on held-out points."""
    density, judge, results = Gaussians(), PointCloud(), []
    data = Toy2D(density, samples=POINTS)
    real = data.split("validation")[0]
    for training in TRAINING:
        denoiser, scores = Expert.read(folder, training).denoiser(), []
        for seed in SAMPLING:
            noise = SampleNoise(seed, range(POINTS), data.shape, "cpu")
            points = DDPM(clip=False)(denoiser, noise)
            found = judge.distances(judge.summary(points), judge.summary(real))
            scores.append(found | mode_coverage(points, density.modes()))
        t, eps = torch.arange(POINTS) % 100, SampleNoise(0, range(POINTS), data.shape, "cpu")(0)
        error = denoiser(denoiser.process.add_noise(real, eps, t), t).eps - eps
        results.append({"scores": scores, "loss": error.square().mean().item()})
    return results


def plane_row(name: str, results: list[dict[str, Any]]) -> str:
    cells = []
    for key, digits in (("KL", 3), ("reverse KL", 3)):
        by_seed = [[scores[key] for scores in result["scores"]] for result in results]
        cells.append(spread([mean(values) for values in by_seed], digits))
        cells.append(f"{mean(stdev(values) for values in by_seed):.3f}")
    for key, digits in (("modes", 1), ("within", 3), ("tv", 3)):
        by_seed = [mean(scores[key] for scores in result["scores"]) for result in results]
        cells.append(spread(by_seed, digits))
    cells.append(spread([result["loss"] for result in results], 4))
    return f"| {name} | {' | '.join(cells)} |"


@torch.no_grad()
def structure(denoiser: Denoiser, data: Digits) -> float:
    """The mean square change of distances between held-out digits, by an encoder of no training."""
    x0 = data.scaled(data.split("validation")[0])
    torch.manual_seed(99)
    encoder, eps = FlatCritic(outputs=32), SampleNoise(0, range(len(x0)), data.shape, "cpu")(0)
    before, changes = relations(encoder(x0, x0)[None]), []
    for t in range(50, 1000, 100):
        at = torch.full((len(x0),), t)
        x0_hat = denoiser(PROCESS.add_noise(x0, eps, at), at).x0.clamp(-1, 1)
        changes.append((before - relations(encoder(x0_hat, at)[None])).square().mean().item())
    return mean(changes)


def on_digits(folder: Path) -> list[dict[str, Any]]:
    """Of each training seed: as `curricula.measured`, and the change of structure."""
    results = measured(folder, 1000)
    for training, result in zip(TRAINING, results):
        result["structure"] = structure(Expert.read(folder, training).denoiser(), Digits())
    return results


def digits_row(name: str, results: list[dict[str, Any]]) -> str:
    change = spread([result["structure"] for result in results], 5)
    return f"{curricula.row(name, results)} {change} |"


def samplers(folder: Path) -> dict[str, list[list[float]]]:
    """FD-pixels of 1,000 images by training and sampling seed, at 25 calls of the network."""
    data, judge, table = Digits(), Pixels(), {}
    reference = judge.real(data.real("validation"), torch.device("cpu"))
    steps = next(n for n in range(25, 99) if len(CAS(n).calls(PROCESS)) == 25)
    first, last = PROCESS.snr(PROCESS.visited(2)).log().tolist()
    gamma = math.exp((first - last) / (2 * (steps - 1)))
    ways: dict[str, Sampler] = {"DDIM": DDIM(25), "DDPM": DDPM(25)}
    for times in (1.001, 1.3, 1.7, 2.5):
        eta = times * (1 - gamma)
        ways[f"CAS, eta {eta:.2f}"] = CAS(steps, eta)
        if (kept := (1 - eta) / gamma) ** 2 > gamma**2:  # as much noise on DDIM's own points
            same = math.sqrt((1 - kept**2) / (1 - gamma**2))
            ways[f"DDIM, eta {same:.2f}"] = DDIM(25, same)
    ways[f"CAS, eta {1 - gamma**2:.2f}, as DDPM"] = CAS(steps)
    for name, sampler in ways.items():
        table[name] = []
        for training in TRAINING:
            denoiser, distances = Expert.read(folder, training).denoiser(), []
            for seed in SAMPLING:
                drawn = sampler(denoiser, SampleNoise(seed, range(1000), data.shape, "cpu"))
                summary = judge.summary(judge(to_uint8(drawn)))
                distances.append(judge.distances(summary, reference)[judge.metric])
            table[name].append(distances)
    return table


def study(
    path: Path,
    rows: dict[str, Variant],
    steps: int,
    train: Callable[..., Path],
    measure: Callable[[Path], list[dict[str, Any]]],
    row: Callable[[str, list[dict[str, Any]]], str],
) -> None:
    """Trains, measures and prints each row; `path` keeps what was done."""
    done = read_json(path) if path.is_file() else {}
    for name, variant in rows.items():
        if name not in done:
            more = 1.0
            if variant.like:
                more = done[variant.like]["seconds"] / done[variant.plain]["seconds"]
            n, began = round(steps * more), time.process_time()
            folder = train(name, variant.options, n, path.with_suffix(""))
            seconds = time.process_time() - began
            done[name] = {"steps": n, "seconds": seconds, "results": measure(folder)}
            write_json(path, done)
        found = done[name]
        shown = f"{name} ({found['steps']:,} steps, {found['seconds']:.0f} s)"
        print(row(shown, found["results"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/adversarial"))
    parser.add_argument("--digits", type=int, default=2000, help="steps of training")
    parser.add_argument("--plane", type=int, default=400, help="steps of training")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def on_points(name: str, options: Sequence[str], steps: int, output: Path) -> Path:
        options = [*options, "--data.density=Gaussians", "--trainer.precision=32-true"]
        return curricula.train(name, options, steps, output, config=PLANE, network="MLPDenoiser")

    # The first training of a process also loads libraries, which is no part of its time.
    curricula.train("warm-up", DIGITS_ROWS["plain"].options, 10, args.output)
    digits = args.output / f"digits-{args.digits}.json"
    study(digits, DIGITS_ROWS, args.digits, curricula.train, on_digits, digits_row)
    for name in ("plain", f"ACSM {1 / 32:g}"):
        for way, found in samplers(digits.with_suffix("") / name.replace(" ", "-")).items():
            floor = mean(stdev(values) for values in found)
            means = spread([mean(values) for values in found], 3)
            print(f"| {name} | {way} | {means} | {floor:.3f} |", flush=True)
    plane = args.output / f"plane-{args.plane}.json"
    study(plane, PLANE_ROWS, args.plane, on_points, on_plane, plane_row)


if __name__ == "__main__":
    main()
