"""Discriminator guidance of a small model of digits, beside its controls (docs/discriminator.md).

The network and the judge of curricula.py, scikit-learn's 8 x 8 digits; each model seed has a model,
samples, and discriminators of its own. What was trained and measured is kept.

    python tests/bench/guidance.py --output runs/guidance
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
from curricula import CONFIG, PROCESS, TRAINING, distances, spread, train

from expertdiff.bundle import Bundle
from expertdiff.cli import main as expertdiff
from expertdiff.diffusion.guidance import Guidance
from expertdiff.discriminator import Discriminator
from expertdiff.files import read_json, write_json
from expertdiff.loggers import read_metrics

LAYER, KEY = CONFIG.parent / "discriminator.yaml", "val/bce/0"
QUIET = [
    "--trainer.logger=JsonLines", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


def run(*args: object) -> None:
    if code := expertdiff([str(arg) for arg in args]):
        raise SystemExit(code)


def discriminator(seed: int, drawn: Path, output: Path, shuffled: bool) -> tuple[Path, float]:
    """The bundle of one, and its lowest held-out cross-entropy."""
    folder = output / ("shuffled" if shuffled else "discriminator")
    run(
        "fit", f"--config={CONFIG}", f"--config={LAYER}", *QUIET, f"--seed_everything={seed}",
        f"--trainer.default_root_dir={folder}", f"--data.generated={drawn / 'samples.npz'}",
        f"--data.shuffled={str(shuffled).lower()}",
    )  # fmt: skip
    run("stitch", folder, "--output", folder / "bundle")
    told = [row[KEY] for row in read_metrics(folder / "metrics.jsonl") if KEY in row]
    return folder / "bundle", min(told)


def measured(seed: int, steps: int, samples: int, output: Path) -> dict[str, list[float]]:
    """The distances of each row, and under "bce" what the discriminators have learnt."""
    path = output.with_suffix(".json")
    rows = read_json(path) if path.is_file() else {}

    def tell(name: str, bundle: Bundle, steps: str, guidance: Guidance | None = None) -> None:
        if name not in rows:
            model = guidance(bundle.denoiser) if guidance else bundle.denoiser
            rows[name] = distances(model, samples, steps)

    def model(name: str, steps: int) -> Bundle:
        options = ["--model=Diffusion", f"--seed_everything={seed}"]
        return Bundle.stitch([train(name, options, steps, output, None)], output / f"{name}-bundle")

    plain = model("model", steps)
    run(
        "sample", plain.folder, "--samples=5000", "--batch_size=1000", "--seed=100",
        "--sampler=DDIM", "--sampler.steps=ddim25", f"--output={output / 'drawn'}",
    )  # fmt: skip
    tell("none", plain, "ddim25")
    tell("none, ten times the steps of the sampler", plain, "ddim250")
    tell("none, ten times the training", model("longer", 10 * steps), "ddim25")
    path_of, bce = discriminator(seed, output / "drawn", output, shuffled=False)
    for weight in (0.5, 1.0, 2.0, 4.0, -1.0):
        tell(f"w = {weight:g}", plain, "ddim25", Discriminator(path_of, weight))
    stale = Discriminator(path_of)  # of the other model's samples
    tell("w = 1, ten times the training", model("longer", 10 * steps), "ddim25", stale)
    path_of, no_bce = discriminator(seed, output / "drawn", output, shuffled=True)
    tell("shuffled labels, w = 1", plain, "ddim25", Discriminator(path_of))
    rows["bce"] = [bce, no_bce]
    write_json(path, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/guidance"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    assert PROCESS.T == 1000  # that of CONFIG
    results = [
        measured(
            seed, args.steps, args.samples, args.output / f"{args.steps}-{args.samples}-{seed}"
        )
        for seed in TRAINING
    ]
    for name in results[0]:
        if name != "bce":
            by_seed = [result[name] for result in results]
            floor = mean(stdev(values) for values in by_seed)
            less = [mean(r[name]) / mean(r["none"]) - 1 for r in results]
            changed = " / ".join(f"{100 * x:+.0f}" for x in less)
            print(f"| {name} | {spread([mean(v) for v in by_seed], 3)} | {floor:.3f} | {changed} |")
    print("held-out BCE, of shuffled labels:", [result["bce"] for result in results])


if __name__ == "__main__":
    main()
