"""What rides along with training: averaged weights, exact checkpoints, losses, pictures."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from expertdiff import checkpoints
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.evaluation.images import save_grid, to_uint8
from expertdiff.files import sha256_of, write_json, write_text
from expertdiff.loggers import JsonLines
from expertdiff.methods.base import Method, device_name

AVERAGED, RAW = "state_dict", "current_model_state"
"""Keys of the two sets of weights in a checkpoint; Lightning loads the first."""


class Interrupted(BaseException):
    """Training stopped at a step border on request, with a checkpoint; it can be resumed."""


class EMA(Callback):
    """Exponential moving average of the weights: validated, checkpointed and shipped.

    ADM's recurrence from the initial weights on: ema = decay ema + (1 - decay) theta, after each
    optimizer step. Checkpoints hold the average as ``state_dict``, the raw weights beside it.
    (Lightning's own WeightAveraging keeps its copy where the model is before it moves to the
    device, starts at the first update, and reads a counter from the device each step.)

    Args:
        decay: of the average, in [0, 1); 0 keeps the raw weights.
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that a short run does not
            measure its random start.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} must be in [0, 1)")
        self.decay, self.warmup = decay, warmup
        self._average: list[Tensor] = []
        self._loaded: dict[str, Tensor] | None = None
        self._updates = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        source = self._loaded or {name: parameter.data for name, parameter in named.items()}
        # torch.empty_like + copy_ keeps the parameter's device and memory format.
        self._average = [torch.empty_like(p.data).copy_(source[name]) for name, p in named.items()]
        self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._updates:
            return  # in the middle of an accumulation
        self._updates = n = trainer.global_step
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        parameters = [parameter.data for parameter in pl_module.parameters()]
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(self._average, parameters, n)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def _exchange(self, pl_module: LightningModule) -> None:
        for i, parameter in enumerate(pl_module.parameters() if self._average else ()):
            parameter.data, self._average[i] = self._average[i], parameter.data

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        names = [name for name, _ in pl_module.named_parameters()]
        checkpoint[RAW] = checkpoint[AVERAGED]
        checkpoint[AVERAGED] = checkpoint[RAW] | dict(zip(names, self._average))
        checkpoint.setdefault(checkpoints.IDENTITY, {})["ema"] = self._identity()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoints.same_run({"ema": self._identity()}, checkpoint)
        pl_module.load_state_dict(checkpoint[RAW])
        self._loaded = checkpoint[AVERAGED]
        self._updates = checkpoint["global_step"]

    def _identity(self) -> dict[str, Any]:
        return {"decay": self.decay, "warmup": self.warmup}


class _VerifiedIO(CheckpointIO):
    """Lightning's reads and writes of checkpoints, done by `expertdiff.checkpoints`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoints.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        checkpoints.remove(Path(path))


class ExactCheckpoint(Checkpoint):
    """Checkpoints from which training goes on with the same bits, in ``<run>/checkpoints``.

    Written at step borders only: every `every_n_steps` optimizer steps, at the end, and on SIGTERM,
    SIGUSR1 or Ctrl-C, after which training stops with `Interrupted`. ``done.json`` appears when
    ``max_steps`` is reached, and nothing else means "finished".

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many checkpoints stay; ``None`` keeps all.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, every_n_steps: int = 1000, keep: int | None = 2) -> None:
        if every_n_steps < 1 or (keep is not None and keep < 1):
            raise ValueError(f"checkpoint every {every_n_steps} steps, keep {keep}: give 1 or more")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.seconds = 0.0
        self._since = 0.0
        self._signalled = False
        self._saved_step = -1
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.strategy.checkpoint_io = _VerifiedIO()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def elapsed(self) -> float:
        """Wall-clock seconds of training, over all resumes."""
        return self.seconds + (time.monotonic() - self._since if self._since else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._saved_step = time.monotonic(), trainer.global_step
        # After Lightning's own, which would end a signalled run with exit code 0.
        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Only a flag: a handler may run in the middle of anything. A second Ctrl-C does not wait.
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        interrupted = self._agreed(trainer)
        if interrupted or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if interrupted and trainer.global_step < trainer.max_steps:
            raise Interrupted(f"stopped at step {trainer.global_step} of {trainer.max_steps}")

    def _agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._signalled
        if trainer.global_step % 10:  # the ranks meet at common steps only, and seldom
            return False
        flag = torch.tensor(self._signalled, dtype=torch.int32, device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="max").item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < trainer.max_steps or trainer.max_steps < 0:
            return
        self._save(trainer)
        if trainer.is_global_zero:
            path = checkpoints.checkpoint_path(self._folder(trainer), trainer.global_step)
            record = {
                "step": trainer.global_step,
                "max_steps": trainer.max_steps,
                "sha256": sha256_of(path),
                "seconds": self.elapsed(),
                "device": device_name(trainer.strategy.root_device),
                "devices": trainer.world_size,
            }
            write_json(Path(trainer.default_root_dir) / "done.json", record)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step == trainer.global_step:
            return
        folder = self._folder(trainer)
        path = checkpoints.checkpoint_path(folder, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = trainer.global_step
        if self.keep is not None and trainer.is_global_zero:
            paths = sorted(folder.glob("step-*.ckpt"), key=checkpoints.step_of)
            for old in paths[: -self.keep]:
                checkpoints.remove(old)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Method, checkpoint: dict[str, Any]
    ) -> None:
        for name, value in checkpoint[RAW].items():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"{pl_module.job} diverged: {name} is not finite at step "
                    f"{trainer.global_step}; lower the learning rate and run again from the last "
                    "checkpoint"
                )


class LossByInterval(Callback):
    """Logs the losses of each interval of the partition, and the speed.

    Training losses are the mean of the steps since the last line, gathered on the device and read
    every ``log_every_n_steps``; validation losses are those of the averaged weights.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Method) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, JsonLines):
                logger.forget_after(trainer.global_step)
        self._start_window(trainer, pl_module)

    def _start_window(self, trainer: Trainer, pl_module: Method) -> None:
        self._sums = torch.zeros(3, len(pl_module.partition), device=pl_module.device)
        self._loss = torch.zeros((), device=pl_module.device)
        self._batches, self._began, self._step = 0, time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Method,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
    ) -> None:
        owner = pl_module.partition.index(pl_module.process.progress(outputs["t"]))
        rows = torch.stack([outputs["mse"], outputs["vb"], torch.ones_like(outputs["mse"])])
        self._sums.index_add_(1, owner, rows)
        self._loss += outputs["loss"]
        self._batches += 1
        steps = trainer.global_step - self._step
        if steps < trainer.log_every_n_steps and trainer.global_step < trainer.max_steps:
            return
        sums, loss = self._sums.tolist(), float(self._loss) / self._batches
        speed = steps / (time.monotonic() - self._began)
        values = {"train/loss": loss, "steps_per_second": speed} | _by_interval("train", sums)
        pl_module.log("loss", loss, prog_bar=True, logger=False)
        _log(trainer, values)
        self._start_window(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Method) -> None:
        self._validation = torch.zeros(3, len(pl_module.partition), device=pl_module.device)
        self._validation_began = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Method,
        outputs: dict[int, tuple[Tensor, Tensor]],
        *_: Any,
    ) -> None:
        for i, (mse, vb) in outputs.items():
            row = torch.stack([mse.sum(), vb.sum(), mse.new_tensor(len(mse))])
            self._validation[:, i] += row

    def on_validation_end(self, trainer: Trainer, pl_module: Method) -> None:
        if trainer.sanity_checking:
            return
        sums = trainer.strategy.reduce(self._validation, reduce_op="sum").tolist()
        _log(trainer, _by_interval("val", sums))
        if trainer.training:
            self._began += time.monotonic() - self._validation_began  # no part of the speed


def _by_interval(stage: str, sums: list[list[float]]) -> dict[str, float]:
    values = {}
    for i, (mse, vb, count) in enumerate(zip(*sums)):
        if count:
            values |= {f"{stage}/mse/{i}": mse / count, f"{stage}/vb/{i}": vb / count}
    return values


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    clock = next((c for c in trainer.callbacks if isinstance(c, ExactCheckpoint)), None)
    seconds = {"seconds": round(clock.elapsed(), 3)} if clock else {}
    for logger in trainer.loggers:
        logger.log_metrics(seconds | values, step=trainer.global_step)


class DenoisingGrid(Callback):
    """After each validation, pictures of what the averaged weights see.

    Rows: validation images; columns: the image, then x_t and the predicted x0 at three points of
    the job's own interval, cleanest first. One expert alone cannot sample, but it can show this.

    Args:
        images: how many.
    """

    def __init__(self, images: int = 8) -> None:
        self.images = images

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Method) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        images, labels = trainer.datamodule.split("validation")
        x0 = trainer.datamodule.scaled(images[: self.images].to(pl_module.device))
        y = labels[: self.images].to(pl_module.device)
        eps = SampleNoise(0, range(len(x0)), x0.shape[1:], x0.device)(0)
        columns = [x0]
        for fraction in (0.0, 0.5, 0.999):
            u = torch.full((len(x0),), fraction, dtype=torch.float64, device=x0.device)
            t = pl_module.process.times(u, pl_module.interval)
            x_t = pl_module.process.add_noise(x0, eps, t)
            columns += [x_t, pl_module.predict_x0(x_t, t, y)]
        tiles = to_uint8(torch.stack(columns, dim=1).flatten(0, 1)).cpu()
        path = Path(trainer.default_root_dir) / "grids" / f"step-{trainer.global_step:08d}.png"
        save_grid(tiles, path, columns=len(columns))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("denoising", [str(path)], step=trainer.global_step)


class ResolvedConfig(SaveConfigCallback):
    """Keeps the resolved configuration in the run's folder and in the loggers.

    Once the run has been accepted, so that a refused one does not replace what was kept.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: a checkpoint may still refuse the run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)

    @rank_zero_only
    def _keep(self, trainer: Trainer) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        write_text(Path(trainer.default_root_dir) / "config.yaml", text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))
