"""What a person watches: losses by interval, speed, pictures, and the configuration."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from expertdiff.callbacks.checkpoint import ExactCheckpoint
from expertdiff.data.images import Images
from expertdiff.data.toys import Toy2D
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.evaluation.points import limits_of, save_scatters
from expertdiff.experts.stacked import StackedDenoiser
from expertdiff.files import write_text
from expertdiff.image_files import save_grid, to_uint8
from expertdiff.loggers import JsonLines, log_picture
from expertdiff.methods.base import Method

POINTS = 2000
"""Points of the plane in a picture of them."""


class LossByInterval(Callback):
    """Logs the losses of each interval of the partition, and the speed.

    Training losses are the mean of the steps since the last line and of all ranks, gathered on the
    device and read every ``log_every_n_steps``; validation losses are those of the averaged
    weights. A loss that is not finite ends the training on all ranks at once.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Method) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, JsonLines):
                logger.forget_after(trainer.global_step)
        self._start_window(trainer, pl_module)

    def _start_window(self, trainer: Trainer, pl_module: Method) -> None:
        self._sums = torch.zeros(3, len(pl_module.partition), device=pl_module.device)
        self._window: list[tuple[int, Tensor, Tensor]] = []  # micro-batch, loss, t: read if need be
        self._began, self._step = time.monotonic(), trainer.global_step

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
        self._window.append((batch_idx, outputs["loss"].detach(), outputs["t"]))
        steps = trainer.global_step - self._step
        if steps < trainer.log_every_n_steps and trainer.global_step < trainer.max_steps:
            return
        mean = torch.stack([loss for _, loss, _ in self._window]).mean()
        told = torch.cat([self._sums.flatten(), mean.reshape(1)])
        if trainer.world_size > 1:
            told = trainer.strategy.reduce(told, reduce_op="sum")
        *flat, loss = told.tolist()
        sums = torch.tensor(flat).view_as(self._sums).tolist()
        loss /= trainer.world_size * len(pl_module.seeds)
        # Lightning has divided that of each micro-batch by how many a step has.
        loss *= trainer.accumulate_grad_batches
        speed = steps / (time.monotonic() - self._began)
        values = {"train/loss": loss, "steps_per_second": speed}
        values |= _by_interval(pl_module.error, "train", sums)
        if scaler := getattr(trainer.precision_plugin, "scaler", None):  # float16 only
            values["loss_scale"] = scaler.get_scale()  # each overflow, a skipped step, halves it
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged(trainer, pl_module))
        # On the CPU: a progress bar asks for it every step, and must not ask the GPU.
        pl_module.log("loss", torch.tensor(loss), prog_bar=True, logger=False)
        _log(trainer, values)
        self._start_window(trainer, pl_module)

    def _diverged(self, trainer: Trainer, method: Method) -> str:
        """What to do, and the first micro-batch of this rank whose loss is not finite."""
        where = "on another rank"
        for n, loss, t in reversed(self._window):
            if not loss.isfinite():
                where = f"first {loss:g} in micro-batch {n}, with t from {t.min():g} to {t.max():g}"
        return (
            f"{method.job} diverged: its loss is not finite in steps {self._step + 1} to "
            f"{trainer.global_step} ({where}); the checkpoints before are whole: start another "
            "study from one (model.init_from), with a lower learning rate or clipped gradients"
        )

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
        if trainer.state.fn == TrainerFn.VALIDATING:
            if trainer.is_global_zero:
                for name, value in _by_interval(pl_module.error, "val", sums).items():
                    print(f"{name}: {value:.6f}")
            return
        _log(trainer, _by_interval(pl_module.error, "val", sums))
        self._began += time.monotonic() - self._validation_began  # no part of the speed


def _by_interval(error: str, stage: str, sums: list[list[float]]) -> dict[str, float]:
    values = {}
    for i, (mse, vb, count) in enumerate(zip(*sums)):
        if count:
            values |= {f"{stage}/{error}/{i}": mse / count, f"{stage}/vb/{i}": vb / count}
    return values


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    clock = next((c for c in trainer.callbacks if isinstance(c, ExactCheckpoint)), None)
    seconds = {"seconds": round(clock.elapsed(), 3)} if clock else {}
    for logger in trainer.loggers:
        logger.log_metrics(seconds | values, step=trainer.global_step)


class DenoisingGrid(Callback):
    """After each validation, a picture of what the averaged weights see.

    Validation data, then x_t and the predicted x0 at three points of the job's own interval,
    cleanest first: a row an image, or a scatter plot of 2,000 points for each of them. One expert
    alone cannot sample, but it can show this.

    Args:
        images: how many.
    """

    def __init__(self, images: int = 8) -> None:
        self.images = images

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Method) -> None:
        data = trainer.datamodule
        if not (drawing(trainer, pl_module) and isinstance(data, (Images, Toy2D))):
            return
        items, labels = data.split("validation")
        n = self.images if isinstance(data, Images) else POINTS
        x0 = data.scaled(items[:n].to(pl_module.device))
        y = labels[:n].to(pl_module.device)
        eps = SampleNoise(0, range(len(x0)), x0.shape[1:], x0.device)(0)
        columns, titles, start = [x0], ["data"], pl_module.mapped(x0)
        for fraction in (0.0, 0.5, 0.999):
            u = torch.full((len(x0),), fraction, dtype=torch.float64, device=x0.device)
            t = pl_module.process.times(u, pl_module.interval)
            x_t = pl_module.process.add_noise(start, eps, t)
            columns += [x_t, pl_module.predict_x0(x_t, t, y)]
            titles += [f"noised, t = {t[0]:g}", "predicted data"]
        with picture_of_step(trainer, "grids", "denoising") as path:
            if isinstance(data, Images):
                tiles = to_uint8(torch.stack(columns, dim=1).flatten(0, 1)).cpu()
                save_grid(tiles, path, columns=len(columns))
            else:
                save_scatters(columns, titles, path, limits_of(torch.cat([x0, *columns[1::2]])))


def drawing(trainer: Trainer, method: Method) -> bool:
    """Whether a picture is due: while fitting, of one network alone, and by one process."""
    fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    alone = not isinstance(method.denoiser, StackedDenoiser)
    return fitting and alone and trainer.is_global_zero


@contextmanager
def picture_of_step(trainer: Trainer, folder: str, key: str) -> Iterator[Path]:
    """Where in a folder of the run to put this step's PNG; the loggers then get it, too."""
    path = Path(trainer.default_root_dir) / folder / f"step-{trainer.global_step:08d}.png"
    yield path
    log_picture(trainer.loggers, key, path, trainer.global_step)


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
