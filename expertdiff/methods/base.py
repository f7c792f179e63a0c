"""The one training step of every method."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from expertdiff.checkpoints import IDENTITY, same_run
from expertdiff.data.base import Batch
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import NetworkDenoiser, PredictionType
from expertdiff.diffusion.objective import Losses, losses
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.diffusion.timesteps import TimestepSampler
from expertdiff.diffusion.weighting import LossWeighting
from expertdiff.networks.network import Network
from expertdiff.seeds import generator, seed_of

GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 spread evenly, however many are taken."""


class Method(LightningModule):
    """Trains one network on one interval of the chain.

    Every random number of a step is a function of (seed, expert, rank, micro-batch), so that a
    resumed run goes on with the same bits, and nothing that validates or samples disturbs it.

    Args:
        network: what is trained.
        process: the noise process.
        prediction: what the network's output means.
        timesteps: which t a batch draws.
        weighting: how much the loss at each t counts.
        partition: the intervals; a single network reports its losses by them.
        optimizer: of the network's parameters.
        lr_scheduler: stepped once an optimizer step; ``None`` keeps the learning rate.
        seed: of this training run; the command line sets it to ``seed_everything``.
    """

    def __init__(
        self,
        network: Network,
        process: NoiseProcess,
        prediction: PredictionType,
        timesteps: TimestepSampler,
        weighting: LossWeighting,
        partition: Partition,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.denoiser = NetworkDenoiser(network, process, prediction)
        self.timesteps, self.weighting, self.partition = timesteps, weighting, partition
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, seed

    @property
    def network(self) -> Network:
        """What is trained."""
        return self.denoiser.network

    @property
    def process(self) -> NoiseProcess:
        """The noise process."""
        return self.denoiser.process

    @property
    @abstractmethod
    def interval(self) -> Interval:
        """The part of the chain this job trains."""

    @property
    @abstractmethod
    def job(self) -> str:
        """The name of this job inside its study."""

    def setup(self, stage: str) -> None:
        self._fit_together()
        if self.trainer.strategy.root_device.type == "cuda":
            # What tensor cores want; on a CPU it gains nothing in training.
            self.network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _fit_together(self) -> None:
        """Raises a ValueError unless the network takes this data."""
        data, classes = self.trainer.datamodule, self.network.num_classes
        if classes is not None and classes != data.num_classes:
            raise ValueError(
                f"the network has num_classes {classes}, {type(data).__name__} has "
                f"{data.num_classes}: give it as many, or null for an unconditional model"
            )
        device = next(self.network.parameters()).device
        x, t = torch.zeros(1, *data.shape, device=device), torch.zeros(1, device=device).long()
        y = t if classes is not None else None
        try:
            shape = tuple(self.network(x, t, y).shape[1:])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the network cannot take data of shape {data.shape}: {reason}"
            ) from error
        if shape not in (data.shape, (2 * data.shape[0], *data.shape[1:])):
            raise ValueError(f"the network makes {shape} of data of shape {data.shape}")

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.network.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch; all its randomness is keyed by the micro-batch of the whole run."""
        accumulate = self.trainer.accumulate_grad_batches
        micro_batch = self.trainer.global_step * accumulate + batch_idx % accumulate
        key = (self.job, self.global_rank, micro_batch)
        torch.manual_seed(seed_of(self.seed, "network", *key))  # dropout
        noise = generator(self.device, self.seed, "noise", *key)
        x0 = batch.x0
        t, importance = self.timesteps.sample(len(x0), self.interval, noise, self.process)
        eps = torch.randn(x0.shape, generator=noise, device=x0.device)
        mse, vb = self._losses(batch, t, eps)
        weight = self.weighting(self.process, t, self.denoiser.prediction).to(mse.dtype)
        loss = (importance * (weight * mse + vb)).mean()
        return {"loss": loss, "mse": mse.detach(), "vb": vb.detach(), "t": t}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[int, tuple[Tensor, Tensor]]:
        """mse [B] and vb [B] by interval, at a fixed t and eps for each (image, interval).

        The same for every method, seed and step, so that a single network and an expert of the
        same interval are compared on the same noise.
        """
        index = batch.index.tolist()
        eps = SampleNoise(0, index, batch.x0.shape[1:], self.device)(0)
        u = ((batch.index + 0.5) * GOLDEN).double() % 1
        result = {}
        for i, interval in enumerate(self.partition.intervals()):
            if self.interval.contains(interval):
                result[i] = tuple(self._losses(batch, self.process.times(u, interval), eps))
        return result

    def predict_x0(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted data [B, ...] at x_t."""
        return self.denoiser(x_t, t, self._labels(y)).x0

    def _losses(self, batch: Batch, t: Tensor, eps: Tensor) -> Losses:
        x_t = self.process.add_noise(batch.x0, eps, t)
        prediction = self.denoiser(x_t, t, self._labels(batch.y))
        return losses(prediction, self.denoiser.prediction, self.process, batch.x0, eps, t)

    def _labels(self, y: Tensor) -> Tensor | None:
        return y if self.network.num_classes is not None else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.setdefault(IDENTITY, {})
        record |= self.run_identity() | {"max_steps": self.trainer.max_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        same_run(self.run_identity(), checkpoint)

    def run_identity(self) -> dict[str, Any]:
        """Whatever changes the bits of a run, except how long it goes on."""
        optimizer = self.optimizer([torch.nn.Parameter(torch.zeros(()))])
        scheduler = self.lr_scheduler and self.lr_scheduler(optimizer)
        return self.identity() | {
            "data": self.trainer.datamodule.identity(),
            "batch_size": self.trainer.datamodule.batch_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "devices": self.trainer.world_size,
            "precision": str(self.trainer.precision),
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(self.trainer.gradient_clip_algorithm),
            "optimizer": {"class": type(optimizer).__name__, **_plain(optimizer.defaults)},
            "lr_scheduler": scheduler
            and {"class": type(scheduler).__name__, **_plain(vars(scheduler))},
        }

    def identity(self) -> dict[str, Any]:
        """What these weights are: plain data, kept in every checkpoint and bundle."""
        return {
            "method": type(self).__name__,
            "job": self.job,
            "interval": [self.interval.lo, self.interval.hi],
            "partition": list(self.partition.edges),
            "process": describe(self.process),
            "prediction": describe(self.denoiser.prediction),
            "network": describe(self.network),
            "timesteps": describe(self.timesteps),
            "weighting": describe(self.weighting),
            "seed": self.seed,
        }


def _plain(value: Any) -> Any:
    """Settings of an optimizer or scheduler as plain data; what has no plain form, by its type."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def device_name(device: torch.device) -> str:
    """The hardware of a run, for its ledger."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
