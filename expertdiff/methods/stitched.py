"""A finished bundle under Lightning: `test` measures it, `predict` draws from it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from expertdiff.bundle import Bundle, check_data, classes_of
from expertdiff.data.base import Batches
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.guidance import Guidance
from expertdiff.diffusion.samplers import SampleNoise, Sampler
from expertdiff.evaluation.judge import Judge, Reference
from expertdiff.evaluation.kinds import Kind, kind
from expertdiff.files import sha256_of, write_json
from expertdiff.loggers import JsonLines, log_picture
from expertdiff.methods.base import device_name
from expertdiff.seeds import generator


@dataclass
class Evaluation:
    """How a bundle is judged.

    Args:
        sampler: how samples are drawn.
        judge: what they are compared with real ones by; only drawing does without.
        samples: how many, for each sampling seed.
        seeds: sampling seeds; a distance is given as mean and spread over them.
        batch_size: samples drawn at a time, on each device.
        guidance: towards the samples' labels, or towards data; by default none.

    Raises:
        ValueError: nothing to draw, or a seed twice.
    """

    sampler: Sampler
    judge: Judge | None = None
    samples: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 500
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} draws nothing: give 1 or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} draw nothing, or the same twice: give different ones"
            )

    def check(self, kind: Kind, model: str) -> None:
        """Raises a ValueError where samples of this kind would be clipped; `model` is its name."""
        if self.sampler.clip and not kind.bounded:
            raise ValueError(
                f"{model} draws points or latents, and the sampler clips them to [-1, 1] as it "
                "does images: set clip to false"
            )

    def guided(self, denoiser: Denoiser, data: Mapping[str, Any]) -> Denoiser:
        """What samples are drawn with; raises a ValueError where it cannot be guided.

        Args:
            denoiser: the model.
            data: what it was trained on (`Data.identity`).
        """
        if self.guidance is None:
            return denoiser
        self.guidance.check(data)
        return self.guidance(denoiser)

    def draw(
        self, denoiser: Denoiser, ours: Kind, shape: tuple[int, ...], seed: int, index: Tensor
    ) -> Tensor:
        """Finished samples [B, ...] with these indices [B], on the device of the denoiser.

        Args:
            denoiser: the model, as `guided` gives it.
            ours: the kind of its samples.
            shape: of one sample.
            seed: the sampling seed.
            index: of the samples.
        """
        device, indices = next(denoiser.parameters()).device, index.tolist()
        labels = sample_labels(classes_of(denoiser), seed, indices, device)
        noise = SampleNoise(seed, indices, shape, device)
        return ours.finished(self.sampler(denoiser, noise, labels))


class Stitched(LightningModule):
    """Tests a bundle against the data's reference items, or draws from it.

    Args:
        bundle: the bundle's folder.
        evaluation: how it is judged.
        output: where ``metrics.json``, ``grid.png`` and drawn samples go; by default
            ``<bundle>/test``.
        lazy: keep one expert in memory and read the next one meanwhile, instead of keeping all.
    """

    def __init__(
        self,
        bundle: Path,
        evaluation: Evaluation,
        output: Path | None = None,
        lazy: bool = False,
    ) -> None:
        super().__init__()
        self.bundle = Bundle.load(bundle, lazy)
        data = self.bundle.manifest["shared"]["data"]
        self.kind = kind(data)
        evaluation.check(self.kind, str(bundle))
        self.denoiser = evaluation.guided(self.bundle.denoiser, data)
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
        """The class [B] of each sample; ``None`` if there is none."""
        return sample_labels(self.bundle.num_classes, seed, index.tolist(), self.device)

    def draw(self, seed: int, index: Tensor) -> Tensor:
        """The samples with these indices, as `Data.real` gives real items: uint8 for images."""
        return self.evaluation.draw(self.denoiser, self.kind, self.bundle.shape, seed, index)

    def on_test_start(self) -> None:
        if self._judge is None:
            raise ValueError("the evaluation has no judge: name one, for example Pixels")
        trained = self.bundle.manifest["shared"]["data"]
        check_data(self.bundle.folder, trained, self.trainer.datamodule.identity())
        for logger in self.trainer.loggers:
            if isinstance(logger, JsonLines):
                logger.forget_after(-1)  # of an earlier test into the same folder
        self._judge.to(self.device)
        if self.trainer.is_global_zero:
            # Checks the judge's weights before hours of sampling, not after.
            self._real = self._summaries()
        self.trainer.strategy.barrier()  # the other ranks find what the first downloads
        self._features: dict[int, list[Tensor]] = {seed: [] for seed in self.evaluation.seeds}
        self._first: list[Tensor] = []
        self._began, self._drawn = time.monotonic(), 0

    @property
    def _judge(self) -> Judge:
        # Held by the evaluation, so it is no submodule: it is no part of the model.
        return self.evaluation.judge

    def test_step(self, batch: tuple[int, Tensor], batch_idx: int) -> None:
        seed, index = batch
        samples = self.draw(seed, index)
        self._features[seed].append(self._judge(samples))
        if seed == self.evaluation.seeds[0] and self._drawn < self.kind.shown:
            self._first.append(samples.cpu())
        self._drawn += len(samples) * self.trainer.world_size
        for logger in self.trainer.loggers:
            logger.log_metrics({"samples": self._drawn}, step=batch_idx + 1)

    def on_test_epoch_end(self) -> None:
        e, bundle = self.evaluation, self.bundle
        gathered = [self._gathered(torch.cat(self._features[seed])) for seed in e.seeds]
        if not self.trainer.is_global_zero:
            return
        against, fresh = self._real
        reference, metric = against.summary, self._judge.metric
        drawn = [self._judge.summary(features) for features in gathered]
        distances = [self._judge.distances(summary, reference) for summary in drawn]
        spreads = {name: _spread([d[name] for d in distances]) for name in distances[0]}
        mean, std = spreads[metric]["mean"], spreads[metric]["std"]
        self.log(metric, mean, rank_zero_only=True)
        experts = bundle.manifest["experts"]
        process = self.denoiser.process
        visited = e.sampler.calls(process)
        owners = bundle.partition.index(process.progress(visited))
        floors = self._judge.distances(fresh, reference)
        result = {
            "name": self.output.name,
            "metric": metric,
            "nearest_to_floor": self._judge.estimate,
            **spreads.pop(metric),
            "further": spreads,
            "seeds": list(e.seeds),
            "samples": e.samples,
            "sampler": describe(e.sampler),
            "guidance": describe(e.guidance),
            "nfe": len(visited),
            "calls": owners.bincount(minlength=len(bundle.partition)).tolist(),
            "reference": against.name,
            "reference_samples": against.count,
            "floor": floors.pop(metric),
            "further_floors": floors,
            "floor_samples": self._fresh,
            "extractor": self._judge.identity,
            "precision": str(self.trainer.precision),
            "weights": bundle.weights,
            "ema_decay": experts[0]["identity"].get("ema", {}).get("decay"),
            "data": type(self.trainer.datamodule).__name__,
            "data_sha256": self.trainer.datamodule.identity()["digest"],
            "steps": {x["identity"]["job"]: x["step"] for x in experts},
            "seconds": time.monotonic() - self._began,
            "device": device_name(self.device),
            "manifest_sha256": sha256_of(bundle.folder / "manifest.json"),
        }
        write_json(self.output / "metrics.json", result)
        self.kind.picture(torch.cat(self._first)[: self.kind.shown], self.output / "grid.png")
        log_picture(self.trainer.loggers, "samples", self.output / "grid.png")
        error = f" ± {std:.3f}" if std is not None else ""
        print(
            f"{metric} {mean:.3f}{error} over sampling seeds {list(e.seeds)} "
            f"(n = {e.samples}, {len(visited)} calls of {type(e.sampler).__name__}, against "
            f"{against.text}; real ones of the other split: {result['floor']:.3f})\n"
            f"results: {self.output / 'metrics.json'}"
        )

    def predict_step(
        self, batch: tuple[int, Tensor], batch_idx: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sample indices, samples as `draw` gives them, labels if the model has classes)."""
        seed, index = batch
        return index, self.draw(seed, index).cpu(), self.labels(seed, index)

    def _gathered(self, features: Tensor) -> Tensor:
        """The features of all ranks in the order of their sample indices."""
        if self.trainer.world_size == 1:
            return features
        most = math.ceil(self.evaluation.samples / self.trainer.world_size)
        padded = F.pad(features, (0, 0, 0, most - len(features)))
        return self.all_gather(padded).transpose(0, 1).flatten(0, 1)[: self.evaluation.samples]

    def _summaries(self) -> tuple[Reference, Any]:
        """The reference, and of as many real items of the other split as are drawn: a floor."""
        data = self.trainer.datamodule
        items, fresh = data.real("reference"), data.fresh(self.evaluation.samples)
        self._fresh = len(fresh)
        reference = self._judge.reference(data.reference, items, self.device)
        return reference, self._judge.real(fresh, self.device)


def sample_labels(
    classes: int | None, seed: int, index: Sequence[int], device: torch.device
) -> Tensor | None:
    """The class [B] of each sample, a function of (seed, index); ``None`` if there is none."""
    if not classes:
        return None
    draws = [
        torch.randint(classes, (), generator=generator("cpu", seed, "label", i)) for i in index
    ]
    return torch.stack(draws).to(device)


def _spread(values: list[float]) -> dict[str, Any]:
    spread = torch.tensor(values, dtype=torch.float64)
    std = spread.std().item() if len(values) > 1 else None
    return {"values": values, "mean": spread.mean().item(), "std": std}
