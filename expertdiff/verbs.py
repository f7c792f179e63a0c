"""Verbs that are plain functions; the command line reads their options from the signatures."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer

from expertdiff.bundle import Bundle
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.samplers import DDIM, Sampler
from expertdiff.evaluation.features import Pixels
from expertdiff.evaluation.images import save_grid, save_npz
from expertdiff.methods.stitched import Evaluation, Stitched
from expertdiff.report import write_report


def stitch(
    experts: list[Path],
    output: Path,
    edges: list[float] | None = None,
    allow_unfinished: bool = False,
) -> None:
    """Make one model of trained experts.

    Args:
        experts: folders of training runs, checkpoints or files of other bundles, in any order; a
            baseline fills the intervals that nobody else serves.
        output: the bundle's folder.
        edges: of the partition, from 0 to 1; by default that of the experts.
        allow_unfinished: also take experts that were not trained to their end.
    """
    partition = Partition(edges) if edges else None
    bundle = Bundle.stitch(experts, output, partition, allow_unfinished)
    for entry in bundle.manifest["experts"]:
        lo, hi = entry["interval"]
        print(f"({lo:g}, {hi:g}]  {entry['source']['path']}, step {entry['step']}")
    print(f"bundle: {output}")


def sample(
    bundle: Path,
    samples: int = 64,
    seed: int = 0,
    sampler: Sampler | None = None,
    batch_size: int = 64,
    precision: str = "32-true",
    output: Path | None = None,
) -> None:
    """Draw images from a bundle: a PNG grid, and an .npz in ADM's layout.

    Args:
        bundle: the bundle's folder.
        samples: how many.
        seed: image i is a function of (seed, i).
        sampler: by default DDIM with 50 steps.
        batch_size: images at a time; does not change them.
        precision: of the network, ``32-true`` or ``bf16-mixed``.
        output: folder of ``samples.png`` and ``samples.npz``; by default ``<bundle>/samples``.
    """
    protocol = Evaluation(sampler or DDIM(), Pixels(), samples, (seed,), batch_size)
    output = Path(output or Path(bundle) / "samples")
    model = Stitched(Path(bundle), protocol, output)
    trainer = Trainer(
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    _, parts, labels = zip(*trainer.predict(model))
    images = torch.cat(parts)
    save_npz(images, output / "samples.npz", None if labels[0] is None else torch.cat(labels))
    save_grid(images[:100], output / "samples.png", columns=round(min(samples, 100) ** 0.5))
    print(f"{samples} images: {output / 'samples.png'}, {output / 'samples.npz'}")


def report(study: Path) -> None:
    """Write the page of a study: what was trained, distances, curves, samples.

    Args:
        study: the study's folder.
    """
    print(f"report: {write_report(study)}")
