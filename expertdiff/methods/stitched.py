"""A finished bundle under Lightning: `test` measures it, `predict` draws from it."""

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from tqdm import tqdm

from expertdiff.bundle import Bundle
from expertdiff.data.base import Batches
from expertdiff.describe import describe
from expertdiff.diffusion.samplers import SampleNoise, Sampler
from expertdiff.evaluation.features import FeatureExtractor
from expertdiff.evaluation.frechet import Statistics, cached_statistics, frechet_distance
from expertdiff.evaluation.images import save_grid, to_uint8
from expertdiff.files import sha256_of, write_json
from expertdiff.loggers import JsonLines
from expertdiff.methods.base import device_name
from expertdiff.seeds import generator

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertdiff"
"""Where statistics of real images are kept."""
GRID = 64
"""Images in the picture beside the numbers."""


@dataclass
class Evaluation:
    """How a bundle is judged.

    Args:
        sampler: how images are drawn.
        features: what the Frechet distance is taken on.
        samples: images a sampling seed.
        seeds: sampling seeds; the distance is given as mean and spread over them.
        batch_size: images drawn at a time, on each device.
    """

    sampler: Sampler
    features: FeatureExtractor
    samples: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 500


class Stitched(LightningModule):
    """Tests a bundle against the data's reference images, or draws from it.

    Args:
        bundle: the bundle's folder.
        evaluation: how it is judged.
        output: where ``metrics.json``, ``grid.png`` and drawn samples go; by default
            ``<bundle>/test``.
    """

    def __init__(self, bundle: Path, evaluation: Evaluation, output: Path | None = None) -> None:
        super().__init__()
        for name in ("samples", "batch_size"):
            if getattr(evaluation, name) < 1:
                raise ValueError(
                    f"{name} {getattr(evaluation, name)} draws nothing: give 1 or more"
                )
        self.bundle = Bundle.load(bundle)
        self.denoiser = self.bundle.denoiser
        self.evaluation = evaluation
        self.output = Path(output) if output else Path(bundle) / "test"

    def sample_batches(self) -> Batches:
        """(seed, sample indices); rank r of W draws the indices r, r + W, r + 2 W, ..."""
        e = self.evaluation
        mine = torch.arange(self.global_rank, e.samples, self.trainer.world_size)
        return Batches([(seed, index) for seed in e.seeds for index in mine.split(e.batch_size)])

    def predict_dataloader(self) -> Batches:
        return self.sample_batches()

    def labels(self, seed: int, index: Tensor) -> Tensor | None:
        """The class [B] of each sample, a function of (seed, index); ``None`` if there is none."""
        if not (classes := self.bundle.num_classes):
            return None
        draws = [
            torch.randint(classes, (), generator=generator("cpu", seed, "label", i))
            for i in index.tolist()
        ]
        return torch.stack(draws).to(self.device)

    def draw(self, seed: int, index: Tensor) -> Tensor:
        """The images (uint8 [B,C,H,W]) with these indices."""
        noise = SampleNoise(seed, index.tolist(), self.bundle.shape, self.device)
        labels = self.labels(seed, index)
        return to_uint8(self.evaluation.sampler(self.denoiser, noise, labels))

    def on_test_start(self) -> None:
        data, ours = self.trainer.datamodule.identity(), self.bundle.manifest["shared"]["data"]
        for key in ("shape", "scale"):
            if data[key] != ours[key]:
                raise ValueError(
                    f"{self.bundle.folder} was trained on data of {key} {ours[key]}, "
                    f"the reference has {data[key]}: name the data it was trained on"
                )
        for logger in self.trainer.loggers:
            if isinstance(logger, JsonLines):
                logger.forget_after(-1)  # of an earlier test into the same folder
        self._extractor.to(self.device)
        # Checks the extractor's weights before hours of sampling, not after.
        self._references = self._reference_statistics()
        self._features: dict[int, list[Tensor]] = {seed: [] for seed in self.evaluation.seeds}
        self._first: list[Tensor] = []
        self._began, self._drawn = time.monotonic(), 0

    @property
    def _extractor(self) -> FeatureExtractor:
        # Held by the evaluation, so it is no submodule: it is no part of the model.
        return self.evaluation.features

    def test_step(self, batch: tuple[int, Tensor], batch_idx: int) -> None:
        seed, index = batch
        images = self.draw(seed, index)
        self._features[seed].append(self._extractor(images))
        if seed == self.evaluation.seeds[0] and self._drawn < GRID:
            self._first.append(images.cpu())
        self._drawn += len(images) * self.trainer.world_size
        for logger in self.trainer.loggers:
            logger.log_metrics({"images": self._drawn}, step=batch_idx + 1)

    def on_test_epoch_end(self) -> None:
        e, bundle = self.evaluation, self.bundle
        generated = {
            seed: Statistics.of(self._gathered(torch.cat(parts)))
            for seed, parts in self._features.items()
        }
        values = [frechet_distance(generated[s], self._references["reference"]) for s in e.seeds]
        spread = torch.tensor(values, dtype=torch.float64)
        mean, std = spread.mean().item(), spread.std().item() if len(values) > 1 else None
        self.log(self._extractor.metric, mean, rank_zero_only=True)
        if not self.trainer.is_global_zero:
            return
        experts = bundle.manifest["experts"]
        process = self.denoiser.process
        visited = torch.tensor(e.sampler.timesteps(process.T))
        owners = bundle.partition.index(process.progress(visited))
        real = self._references
        result = {
            "name": self.output.name,
            "metric": self._extractor.metric,
            "values": values,
            "mean": mean,
            "std": std,
            "seeds": list(e.seeds),
            "samples": e.samples,
            "sampler": describe(e.sampler),
            "nfe": len(visited),
            "calls": owners.bincount(minlength=len(bundle.partition)).tolist(),
            "reference": self.trainer.datamodule.reference,
            "reference_samples": real["reference"].count,
            "floor": frechet_distance(real["train"], real["reference"]),
            "floor_samples": real["train"].count,
            "extractor": self._extractor.identity,
            "precision": str(self.trainer.precision),
            "ema_decay": experts[0]["identity"]["ema"]["decay"],
            "data": type(self.trainer.datamodule).__name__,
            "data_sha256": self.trainer.datamodule.identity()["digest"],
            "steps": {x["identity"]["job"]: x["step"] for x in experts},
            "seconds": time.monotonic() - self._began,
            "device": device_name(self.device),
            "manifest_sha256": sha256_of(bundle.folder / "manifest.json"),
        }
        write_json(self.output / "metrics.json", result)
        save_grid(torch.cat(self._first)[:GRID], self.output / "grid.png", columns=8)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(self.output / "grid.png")])
        error = f" ± {std:.3f}" if std is not None else ""
        print(
            f"{self._extractor.metric} {mean:.3f}{error} over sampling seeds {list(e.seeds)} "
            f"(n = {e.samples}, {len(visited)} steps of {type(e.sampler).__name__}, against "
            f"{real['reference'].count} {self.trainer.datamodule.reference} images; real training "
            f"images: {result['floor']:.3f})\nresults: {self.output / 'metrics.json'}"
        )

    def predict_step(
        self, batch: tuple[int, Tensor], batch_idx: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sample indices, uint8 images, labels if the model has classes)."""
        seed, index = batch
        return index, self.draw(seed, index).cpu(), self.labels(seed, index)

    def _gathered(self, features: Tensor) -> Tensor:
        """The features of all ranks in the order of their sample indices."""
        if self.trainer.world_size == 1:
            return features
        most = math.ceil(self.evaluation.samples / self.trainer.world_size)
        padded = F.pad(features, (0, 0, 0, most - len(features)))
        return self.all_gather(padded).transpose(0, 1).flatten(0, 1)[: self.evaluation.samples]

    def _reference_statistics(self) -> dict[str, Statistics]:
        """Of the reference images, and of as many training images as are drawn: the floor."""
        data = self.trainer.datamodule
        most = {"reference": None, "train": self.evaluation.samples}

        def statistics(name: str) -> Statistics:
            images = data.split(name)[0][: most[name]]
            digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
            return cached_statistics(
                CACHE,
                lambda: Statistics.of(self._all_features(images)),
                data_digest=digest,
                count=len(images),
                resolution=images.shape[-1],
                extractor=self._extractor.identity,
            )

        # One rank computes what all need; the others read it from the cache.
        if self.trainer.is_global_zero:
            result = {name: statistics(name) for name in most}
        self.trainer.strategy.barrier()
        return result if self.trainer.is_global_zero else {name: statistics(name) for name in most}

    def _all_features(self, images: Tensor) -> Tensor:
        batches = tqdm(images.split(100), desc="reference features", leave=False)
        return torch.cat([self._extractor(batch.to(self.device)).cpu() for batch in batches])
