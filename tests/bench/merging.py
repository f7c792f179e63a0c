"""Experts merged into one network, or taught to one, each against its control (docs/merging.md).

The network and the judge of curricula.py, scikit-learn's 8 x 8 digits, three training seeds, each
from its own first network. What was measured before is kept in the output folder.

    python tests/bench/merging.py --output runs/merging
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from curricula import TRAINING, judged, row, train

from expertdiff.analysis.merging import Loss, Samples, search
from expertdiff.bundle import Bundle, Expert, Merger
from expertdiff.data.images import Digits
from expertdiff.diffusion.samplers import DDIM
from expertdiff.evaluation.features import Pixels
from expertdiff.files import read_json, write_json
from expertdiff.methods.stitched import Evaluation

QUARTERS = "[0, 0.25, 0.5, 0.75, 1]"
TUNED = "--model.optimizer.lr=3e-4"


class Seed:
    """Everything of one training seed.

    Args:
        seed: of its trainings.
        steps: of the first network, and of all that comes after it together.
        samples: that a distance is of.
        output: the folder.
    """

    def __init__(self, seed: int, steps: int, samples: int, output: Path) -> None:
        self.seed, self.steps, self.samples = seed, steps, samples
        self.output = output / f"{steps}-{seed}"
        self.path = self.output / f"results-{samples}.json"
        self.results = read_json(self.path) if self.path.is_file() else {}

    def fit(self, name: str, options: Sequence[str], steps: int) -> Path:
        """A run, trained if it is not yet."""
        folder = self.output / name
        if not (folder / "done.json").is_file():
            options = [*options, f"--seed_everything={self.seed}"]
            train(name, options, steps, self.output, seeds=None)
        return folder

    def experts(self, method: str, options: Sequence[str]) -> list[Path]:
        """Runs of one expert a quarter of the chain, together as long as one network."""
        options = [f"--model={method}", *options, f"--model.partition.edges={QUARTERS}"]
        return [
            self.fit(f"{method}-{i}", [*options, f"--model.expert={i}"], self.steps // 4)
            for i in range(4)
        ]

    def tell(self, name: str, denoiser: torch.nn.Module) -> None:
        if name not in self.results:
            self.results[name] = judged(denoiser, self.samples)
            write_json(self.path, self.results)

    def merging(self) -> None:
        first = self.fit("first", ["--model=Diffusion"], self.steps)
        self.tell("the first network", Expert.read(first).denoiser())
        start = [TUNED, f"--model.init_from={first}"]
        for name, steps in (("steps", self.steps), ("FLOPs", self.steps * 4 // 3)):
            control = self.fit(f"on-{name}", ["--model=Diffusion", *start], steps)
            self.tell(f"control: trained on, equal {name}", Expert.read(control).denoiser())
        for method in ("MDM", "Decoupled"):
            runs = self.experts(method, start)
            bundle = Bundle.stitch(runs, self.output / f"{method}-bundle")
            self.tell(f"`{method}`, four experts", bundle.denoiser)
            merger = Merger(Expert.read(first), [Expert.read(run) for run in runs])
            self.merged(method, merger)

    def merged(self, method: str, merger: Merger) -> None:
        evaluation = Evaluation(DDIM("ddim25"), Pixels(), self.samples, batch_size=1000)
        told = {
            "mean": None,
            "by loss": Loss(Digits(), 2000),
            "by samples": Samples(merger.origin, Digits(), evaluation),
        }
        for name, by in told.items():
            if (title := f"`{method}`, merged, {name}") not in self.results:
                shares = search(merger, by, 100) if by else [1 / len(merger.experts)] * 4
                print(title, [round(share, 2) for share in shares], flush=True)
                self.tell(title, merger.merged(shares).denoiser())

    def distilling(self) -> None:
        teacher = Bundle.load(self.output / "MDM-bundle")
        first = f"--model.init_from={self.output / 'first'}"
        options = ["--model=Distillation", f"--model.teacher={teacher.folder}", TUNED, first]
        student = self.fit("distilled", options, self.steps)
        self.tell("`Distillation` of `MDM`'s experts", Expert.read(student).denoiser())
        steps = 2 * self.steps  # those of the teacher, too
        control = self.fit("on-twice", ["--model=Diffusion", TUNED, first], steps)
        self.tell("control: trained on, twice the steps", Expert.read(control).denoiser())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/merging"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [Seed(seed, args.steps, args.samples, args.output) for seed in TRAINING]
    for seed in seeds:
        seed.merging()
        seed.distilling()
    for name in seeds[0].results:
        print(row(name, [seed.results[name] for seed in seeds]), flush=True)


if __name__ == "__main__":
    main()
