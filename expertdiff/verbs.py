"""Verbs that are plain functions; the command line reads their options from the signatures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from expertdiff.bundle import Bundle, check_data, read_manifest
from expertdiff.data.base import Data
from expertdiff.devices import accelerator, default_device
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.guidance import Guidance
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.samplers import Sampler
from expertdiff.evaluation.kinds import kind
from expertdiff.evaluation.likelihood import bits_per_dimension, log_likelihood
from expertdiff.experts.multistage import MultiStage
from expertdiff.experts.remixed import Remixed
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import replacing, writable, write_json
from expertdiff.methods.stitched import Evaluation, Stitched
from expertdiff.report import write_report


def stitch(
    experts: list[Path],
    output: Path,
    edges: list[float] | None = None,
    allow_unfinished: bool = False,
    seed: int | None = None,
) -> None:
    """Make one model of trained experts.

    Args:
        experts: folders of training runs, checkpoints or files of other bundles, in any order; a
            baseline fills the intervals that nobody else serves.
        output: the bundle's folder.
        edges: of the partition, from 0 to 1; by default that of the experts.
        allow_unfinished: also take experts that were not trained to their end.
        seed: which network to take of runs that trained several seeds side by side.
    """
    partition = Partition(edges) if edges else None
    bundle = Bundle.stitch(experts, output, partition, allow_unfinished, seed)
    for entry in bundle.manifest["experts"]:
        lo, hi = entry["interval"]
        print(f"({lo:g}, {hi:g}]  {entry['source']['path']}, step {entry['step']}")
    print(f"bundle: {output}")


def sample(
    bundle: Path,
    samples: int | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    batch_size: int | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None,
    lazy: bool = False,
    output: Path | None = None,
) -> None:
    """Draw from a bundle: images as a PNG grid and an .npz, points as a picture and a .csv.

    Args:
        bundle: the bundle's folder.
        samples: how many; by default 64 images or 10,000 points.
        seed: sample i is a function of (seed, i).
        sampler: by default DDIM with 50 steps for images, DDPM with all steps for points.
        guidance: towards labels, as ``ClassifierFree --guidance.scale 1.5``, or towards data, as
            ``Discriminator --guidance.path DIR --guidance.weight 1``; by default none.
        batch_size: samples at a time, does not change them; by default 64 images or 10,000 points.
        precision: of the network; by default that of its training.
        lazy: keep one expert in memory and read the next one meanwhile; the samples are the same.
        output: folder of ``samples.png`` and of ``samples.npz`` (ADM's layout) or ``samples.csv``
            (in the coordinates of the training file); by default ``<bundle>/samples``.
    """
    manifest = read_manifest(Path(bundle))
    data, trained = manifest["shared"]["data"], manifest["experts"][0]["identity"]
    ours = kind(data)
    protocol = Evaluation(
        sampler or ours.sampler(),
        samples=ours.shown if samples is None else samples,
        seeds=(seed,),
        batch_size=ours.shown if batch_size is None else batch_size,
        guidance=guidance,
    )
    output = Path(output or Path(bundle) / "samples")
    writable(output)
    model = Stitched(Path(bundle), protocol, output, lazy)
    trainer = Trainer(
        devices=1,
        accelerator=accelerator(),
        precision=precision or trained.get("precision", "32-true"),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    _, parts, labels = zip(*trainer.predict(model))
    drawn, labels = torch.cat(parts), None if labels[0] is None else torch.cat(labels)
    path = ours.save(drawn, labels, output, data["scale"])
    ours.picture(drawn[: ours.shown], output / "samples.png")
    print(f"{len(drawn)} samples: {output / 'samples.png'}, {path}")


def quantize(bundle: Path, output: Path) -> None:
    """Write a bundle once more with weights in int8, a quarter of its size.

    The weights of linear layers and convolutions are rounded to 255 levels an output channel, the
    small rest stays float32. Every verb takes the result as it takes any bundle, and computes with
    the rounded weights in its own precision; what trains or stitches needs the original.

    Args:
        bundle: the bundle's folder.
        output: the new bundle's folder.
    """
    Bundle.quantize(bundle, output)
    before, after = (
        sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        for folder in (bundle, output)
    )
    print(f"{before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB in int8: {before / after:.2f}")
    print(f"bundle: {output}")


def export(bundle: Path, output: Path) -> None:
    """Write the experts of a bundle as plain networks, as the projects they come from keep them.

    Mixed experts, and decoders of one encoder, become networks of their own. The files hold tensors
    by the keys of ADM and DiT and nothing else; `--model.init_from` takes them, too.

    Args:
        bundle: the bundle's folder.
        output: folder of ``00.pt`` (the cleanest), ``01.pt`` .., and ``experts.json``: who acts
            where.
    """
    model = Bundle.load(bundle).denoiser
    output, facts = Path(output), {}
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    for i, (interval, weights) in enumerate(_plain(model)):
        with replacing(output / f"{i:02d}.pt") as temporary:
            torch.save(weights, temporary)
        facts[f"{i:02d}.pt"] = [interval.lo, interval.hi]
    write_json(output / "experts.json", facts)
    print(f"{len(facts)} networks: {output}")


def _plain(model: Denoiser) -> Iterator[tuple[Interval, dict[str, Tensor]]]:
    """Each interval of a model, and the plain network that acts there; one at a time in memory."""
    routed = isinstance(model, RoutedExperts)
    intervals = model.partition.intervals() if routed else [Interval()]
    for interval, part in zip(intervals, model.experts if routed else [model]):
        network = part.network
        if not isinstance(network, (Remixed, MultiStage)):
            yield interval, network.state_dict()
            continue
        for i, own in enumerate(network.partition.intervals()):
            lo, hi = max(interval.lo, own.lo), min(interval.hi, own.hi)
            if lo < hi:
                yield Interval(lo, hi), network.expert(i)


def likelihood(
    bundle: Path, data: Data, samples: int = 100, seed: int = 0, batch_size: int = 50
) -> None:
    """Tell how likely a model finds held-out data: bits a dimension of images, bits of points.

    By the probability flow, followed piecewise between the borders of experts; one probe an image
    estimates its divergence.

    Args:
        bundle: the bundle's folder.
        data: whose reference items are asked about.
        samples: how many, from the first on.
        seed: of the probes, and of the noise within each byte.
        batch_size: items at a time.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples {samples} and batch_size {batch_size} must be at least 1")
    model = Bundle.load(bundle)
    images = len(model.shape) == 3
    items, ours = data.split("reference")[0][:samples], model.manifest["shared"]["data"]
    if len(items) < 2:
        raise ValueError(f"samples {samples} leave {len(items)} items: ask about 2 or more")
    check_data(bundle, ours, data.identity())
    if "autoencoder" in ours:
        raise ValueError(f"{bundle} draws latents, whose likelihood is not that of their images")
    if model.num_classes:
        raise ValueError(f"{bundle} has classes, of which no likelihood is defined here")
    device = default_device()
    denoiser, found = model.denoiser.to(device), []
    for index in tqdm(torch.arange(len(items)).split(batch_size), leave=False):
        part = items[index].to(device)
        found.append(
            bits_per_dimension(denoiser, part, index.tolist(), seed)
            if images
            else -log_likelihood(denoiser, data.scaled(part))
        )
    bits = torch.cat(found)
    error = bits.std().item() / len(bits) ** 0.5
    unit = "bits a dimension" if images else "bits"
    print(f"{bits.mean():.4f} +- {error:.4f} {unit} (mean and its standard error, n = {len(bits)})")


def report(study: Path) -> None:
    """Write the page of a study: what was trained, distances, curves, samples.

    Args:
        study: the study's folder.
    """
    print(f"report: {write_report(study)}")
