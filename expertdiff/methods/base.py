"""The one training step of every method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from expertdiff.bundle import Expert
from expertdiff.checkpoints import IDENTITY, same_run
from expertdiff.data.base import Batch
from expertdiff.describe import Described, build, describe, differences
from expertdiff.diffusion.denoiser import NetworkDenoiser, Prediction, PredictionType
from expertdiff.diffusion.exact import terminal_mismatch
from expertdiff.diffusion.objective import Losses, losses
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.diffusion.timesteps import Step, TimestepSampler
from expertdiff.diffusion.weighting import LossWeighting
from expertdiff.experts.multistage import MultiStage
from expertdiff.experts.size import active, stored
from expertdiff.experts.stacked import StackedDenoiser
from expertdiff.networks.network import Network
from expertdiff.seeds import generator, reseed, seed_of

MISMATCH = 0.01
"""Bits at the noisy end of the chain from which on a user is warned."""

GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 spread evenly, however many are taken."""


class Method(LightningModule, ABC):
    """Trains one network on one interval of the chain.

    Every random number of a step is a function of (seed, expert, rank, micro-batch), so that a
    resumed run goes on with the same bits, and nothing that validates or samples disturbs it.
    Several seeds may be trained side by side as one program, each with the numbers that it would
    have alone: small networks leave a device idle, and share the cost of the loop.

    Args:
        network: what is trained, from first weights that the seed decides, not from those it has.
        process: the noise process.
        prediction: what the network's output means.
        timesteps: which t a batch draws.
        weighting: how much the loss at each t counts.
        partition: the intervals; a single network reports its losses by them.
        optimizer: of the network's parameters.
        lr_scheduler: stepped once an optimizer step; ``None`` keeps the learning rate, and a
            CosineAnnealingLR with ``T_max`` 0 ends with the run, however long that is.
        seed: of this training run; the command line sets it to ``seed_everything``.
        seeds: train one network for each of these side by side, instead of one for `seed`.
        init_from: start from the averaged weights of this run's folder, checkpoint, or file of a
            bundle, or from a ``.pt`` of the project that the network is from.

    Raises:
        ValueError: a seed twice, or first weights of another network.
    """

    error = "mse"
    """The name under which the first of its two losses is logged."""

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
        seeds: Sequence[int] | None = None,
        init_from: Path | None = None,
    ) -> None:
        super().__init__()
        self.timesteps, self.weighting, self.partition = timesteps, weighting, partition
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.seeds = [seed] if seeds is None else list(seeds)
        if self.timesteps.learns and len(self.seeds) > 1:
            raise ValueError(
                f"seeds {self.seeds} cannot be trained side by side by "
                f"{type(timesteps).__name__}, which learns from one: train one seed a job"
            )
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"seeds {self.seeds} name no run, or one twice: give different ones")
        networks = [initialised(network, s, self.job) for s in self.seeds]
        self.init_from = init_from and Expert.start(init_from)
        if self.init_from:
            for member in networks:
                _start(member, prediction, self.init_from)
            # Their names and shapes remain: the numbers would be in memory twice.
            weights = {key: value.to("meta") for key, value in self.init_from.weights.items()}
            self.init_from = replace(self.init_from, weights=weights)
        if seeds is None:
            self.denoiser = NetworkDenoiser(*networks, process, prediction)
        else:
            self.denoiser = StackedDenoiser(networks, process, prediction)
        own = self.denoiser.partition
        self.timesteps.prepare(process, self.interval, own if len(own) > 1 else partition)

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
        if stage == "fit":
            if self.trainer.precision == "16-mixed":
                self._check_float16()
            for interval in self._validated.values():
                # Refuses one without timesteps, and not after hours.
                self.process.times(torch.zeros(1), interval)
            self._warn_of_the_end()
            self._tell_sizes()
        if self.trainer.strategy.root_device.type == "cuda":
            # What tensor cores want; on a CPU it gains nothing in training.
            self.network.to(memory_format=torch.channels_last)

    def _check_float16(self) -> None:
        """Raises a ValueError for what gradients in float16, which are scaled, do not allow."""
        if isinstance(self.denoiser, StackedDenoiser):
            raise ValueError("seeds cannot be trained side by side in 16-mixed: use bf16-mixed")
        optimizer, most = self._optimizer_of_nothing(), self.trainer.gradient_clip_val
        # A fused one has scaled gradients until it has stepped.
        if most and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"gradients cannot be clipped (gradient_clip_val {most}) in 16-mixed with a fused "
                f"{type(optimizer).__name__}: use bf16-mixed, or set model.optimizer.fused to false"
            )

    @torch.no_grad()
    def _fit_together(self) -> None:
        """Raises a ValueError unless the network takes this data."""
        data, classes = self.trainer.datamodule, self.network.num_classes
        if classes is not None and classes != data.num_classes:
            raise ValueError(
                f"the network has num_classes {classes}, {type(data).__name__} has "
                f"{data.num_classes}: give it as many, or null for an unconditional model"
            )
        made_for, T = self.network.T, getattr(self.process, "T", None)
        if made_for not in (None, T):
            raise ValueError(
                f"the network is made for {made_for} timesteps, the process has {T}: "
                f"set network.T to {T}"
            )
        n, device = len(self.seeds), next(self.network.parameters()).device
        x, t = torch.zeros(n, *data.shape, device=device), torch.zeros(n, device=device).long()
        y = t if classes is not None else None
        x, _ = self.denoiser.from_data(x)
        try:
            shape = tuple(self.denoiser.output(x, t, y).shape[1:])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the network cannot take data of shape {data.shape}: {reason}"
            ) from error
        if shape not in self.made_of(data.shape):
            raise ValueError(f"the network makes {shape} of data of shape {data.shape}")

    def made_of(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the network may make of an item of this shape."""
        return [shape, (2 * shape[0], *shape[1:])]

    def _warn_of_the_end(self) -> None:
        """Says when the chain ends elsewhere than sampling starts; of low-dimensional data only."""
        data = self.trainer.datamodule
        if len(data.shape) > 1 or self.interval.hi < 1:
            return
        bits = terminal_mismatch(self.process, data.scaled(data.split("train")[0]))
        if bits > MISMATCH:
            rank_zero_warn(
                f"at its noisiest step the chain is {bits:.2g} bits from the normal distribution "
                "that sampling starts from, an error no network can mend: use a schedule that "
                "goes further, as QuadraticBetas with last 0.2"
            )

    def _tell_sizes(self) -> None:
        """Says what acts where, of networks whose parts differ."""
        if isinstance(self.network, MultiStage) and self.trainer.is_global_zero:
            print(f"parameters: {stored(self.denoiser):,} stored")
            for each in active(self.denoiser, self.trainer.datamodule.shape):
                print(
                    f"{each.parameters:,} active in {each.interval}, "
                    f"{each.flops / 1e6:,.1f} MFLOPs a prediction"
                )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())
        if (scheduler := self._scheduler(optimizer)) is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def parameter_groups(self) -> Any:
        """What the optimizer is given: parameters, or groups of them with their own settings."""
        return self.network.parameters()

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        scheduler = self.lr_scheduler and self.lr_scheduler(optimizer)
        if isinstance(scheduler, CosineAnnealingLR) and scheduler.T_max == 0:
            scheduler.T_max = self.trainer.max_steps
        return scheduler

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_algorithm in (None, "norm") and (gradient_clip_val or 0) > 0:
            # The norm of the model alone, without what a method trains beside it.
            self.denoiser.clip_gradients(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of a batch; all its randomness is keyed by the micro-batch of the whole run."""
        accumulate = self.trainer.accumulate_grad_batches
        micro_batch = self.trainer.global_step * accumulate + batch_idx % accumulate
        key = (self.job, self.global_rank, micro_batch)
        reseed(self.device, self.seeds[0], "network", *key)  # dropout
        draws = [
            self._draw(x0, seed, key)
            for seed, x0 in zip(self.seeds, batch.x0.chunk(len(self.seeds)))
        ]
        t, importance, eps = (torch.cat(parts) for parts in zip(*draws))
        (mse, vb), prediction = self.learned(batch, t, eps)
        weight = self.weighting(self.process, t, self.denoiser.prediction).to(mse.dtype)
        each = weight * mse + vb
        if self.timesteps.learns:
            told = self.all_gather(torch.stack([t.double(), each.detach().double()]))
            at, of_all = told.reshape(-1, 2, len(t)).unbind(1)
            self.timesteps.update(at.flatten().long(), of_all.flatten())
        loss = self.averaged((importance * each).unflatten(0, (len(self.seeds), -1)))
        loss = (loss + self.regularised(batch, prediction, t)).sum()
        return {"loss": loss, "mse": mse.detach(), "vb": vb.detach(), "t": t}

    def _draw(
        self, x0: Tensor, seed: int, key: tuple[int | str, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t [B], importance [B] and eps [B, ...] for the items of one seed."""
        noise = generator(self.device, seed, "noise", *key)
        intervals, step = self.drawn(seed, key), self._step(seed, key)
        draws = [
            self.timesteps.sample(len(part), interval, noise, self.process, step)
            for interval, part in zip(intervals, x0.tensor_split(len(intervals)))
        ]
        t, importance = (torch.cat(parts) for parts in zip(*draws))
        return t, importance, torch.randn(x0.shape, generator=noise, device=x0.device)

    def _step(self, seed: int, key: tuple[int | str, ...]) -> Step:
        _, rank, micro_batch = key
        trainer, accumulate = self.trainer, self.trainer.accumulate_grad_batches
        return Step(
            generator(self.device, seed, "shared", self.job, trainer.global_step),
            rank * accumulate + micro_batch % accumulate,
            trainer.world_size * accumulate,
            trainer.global_step / trainer.max_steps,
        )

    def drawn(self, seed: int, key: tuple[int | str, ...]) -> list[Interval]:
        """Where a micro-batch draws its t: in order, and equally many from each."""
        return [self.interval]

    def averaged(self, each: Tensor) -> Tensor:
        """The loss of each seed [S], of its items' losses [S, B]."""
        return each.mean(1)

    def regularised(self, batch: Batch, prediction: Prediction, t: Tensor) -> Tensor | float:
        """What a method adds to the loss of each seed, [S], for its prediction at t [B]."""
        return 0.0

    @property
    def _validated(self) -> dict[int, Interval]:
        """The intervals of the partition that this job covers, by their numbers."""
        intervals = enumerate(self.partition.intervals())
        return {i: interval for i, interval in intervals if self.interval.contains(interval)}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[int, tuple[Tensor, Tensor]]:
        """mse [B] and vb [B] by interval, at a fixed t and eps for each (image, interval).

        The same for every method, seed and step, so that a single network and an expert of the
        same interval are compared on the same noise.
        """
        batch = Batch(*(part.repeat(len(self.seeds), *[1] * (part.ndim - 1)) for part in batch))
        eps = SampleNoise(0, batch.index.tolist(), batch.x0.shape[1:], self.device)(0)
        result = {}
        for i, interval in self._validated.items():
            t = validation_t(self.process, batch.index, interval)
            result[i] = tuple(self.losses(batch, t, eps)[0])
        return result

    def predict_x0(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted data [B, ...] at x_t."""
        return self.denoiser.to_data(self.denoiser(x_t, t, self._labels(y)).x0)

    def losses(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, Prediction | None]:
        """Of each item, at its t [B] and eps [B, ...]; and the prediction, if there is one."""
        x0 = self.mapped(batch.x0)
        x_t = self.process.add_noise(x0, eps, t)
        prediction = self.denoiser(x_t, t, self._labels(batch.y))
        kind = self.denoiser.prediction
        return losses(prediction, kind, self.process, x0, eps, t), prediction

    def mapped(self, x0: Tensor) -> Tensor:
        """What is noised, of data x0 [B, ...]: they themselves, where no flow lies in front."""
        return self.denoiser.from_data(x0)[0]

    def learned(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, Prediction | None]:
        """What training minimises, where that is not `losses`, which validation tells."""
        return self.losses(batch, t, eps)

    def _labels(self, y: Tensor) -> Tensor | None:
        return y if self.network.num_classes is not None else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.setdefault(IDENTITY, {})
        record |= self.run_identity()
        record |= {"max_steps": self.trainer.max_steps, "versions": versions()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        same_run(self.run_identity(), checkpoint)
        theirs = checkpoint[IDENTITY].get("versions")
        if changed := differences(versions(), theirs, "versions"):
            rank_zero_warn(f"a training goes on with other {'; '.join(changed)}: not bit for bit")

    def run_identity(self) -> dict[str, Any]:
        """Whatever changes the bits of a run, except how long it goes on."""
        optimizer = self._optimizer_of_nothing()
        scheduler = self._scheduler(optimizer)
        paced = [describe(c) for c in self.trainer.callbacks if isinstance(c, Described)]
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
            # What goes by the length of the run would not go on alike in another one.
            "callbacks": paced or None,
            "paced_by": self.trainer.max_steps if paced or self.timesteps.paced else None,
        }

    def _optimizer_of_nothing(self) -> torch.optim.Optimizer:
        """One like that of the training, to be asked for its settings."""
        return self.optimizer([torch.nn.Parameter(torch.zeros(()))])

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
            "seeds": self.seeds,
            "stacked": isinstance(self.denoiser, StackedDenoiser),
            "init_from": self.init_from and self.init_from.sha256,
        }


def validation_t(process: NoiseProcess, index: Tensor, interval: Interval) -> Tensor:
    """The t [B] of the validation items `index` in an interval, the same for every model."""
    return process.times(((index + 0.5) * GOLDEN).double() % 1, interval)


def initialised(network: Network, seed: int, job: str) -> Network:
    """A new network like this one, with the first weights that `seed` gives this job."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_of(seed, "init", job))
        return build(describe(network), Network)


def _start(network: Network, prediction: PredictionType, expert: Expert) -> None:
    theirs = expert.identity.get("prediction", describe(prediction))
    if changed := differences(describe(prediction), theirs, "prediction"):
        raise ValueError(
            f"training cannot start from {expert.path}, whose output means something else "
            f"({'; '.join(changed)}): choose the same model.prediction"
        )
    try:
        network.start_from(expert.weights)
    except ValueError as error:
        raise ValueError(f"training cannot start from {expert.path}: {error}") from error


def _plain(value: Any) -> Any:
    """Settings of an optimizer or scheduler as plain data; what has no plain form, by its type."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def versions() -> dict[str, str]:
    """Of the libraries that decide the bits of a training."""
    return {"torch": str(torch.__version__), "lightning": lightning.__version__}


def device_name(device: torch.device) -> str:
    """The hardware of a run, for its ledger."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
