"""Checkpoints from which training goes on with the same bits."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from expertdiff import checkpoints
from expertdiff.checkpoints import RAW
from expertdiff.files import sha256_of, write_json
from expertdiff.methods.base import Method, device_name


class Interrupted(BaseException):
    """Training stopped at a step border on request, with a checkpoint; it can be resumed."""


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, the signals that ask to stop are `handler`'s."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    listen(handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def listen(handler: Callable[[int, Any], None]) -> None:
    """From now on, the signals that ask to stop are `handler`'s."""
    for number in SIGNALS:
        signal.signal(number, handler)


def stop_at_once(number: int, frame: Any) -> None:
    """A handler for the time before training, when there is nothing to save."""
    raise Interrupted("stopped before training began")


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
    SIGUSR1, SIGHUP or Ctrl-C, after which training stops with `Interrupted`. ``done.json`` appears
    when ``max_steps`` is reached.

    Several ranks stop at one step: every `ASK_EVERY` seconds, counted in steps that they agree on,
    they ask each other on their hosts, so that no accelerator has to wait.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many checkpoints stay; ``None`` keeps all.
    """

    ASK_EVERY = 5.0

    def __init__(self, every_n_steps: int = 1000, keep: int | None = 2) -> None:
        if every_n_steps < 1 or (keep is not None and keep < 1):
            raise ValueError(f"checkpoint every {every_n_steps} steps, keep {keep}: give 1 or more")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.seconds = 0.0
        self._since = 0.0
        self._signalled = False
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer.strategy.checkpoint_io = _VerifiedIO()
        # Lightning's handler of SIGTERM broadcasts wherever the signal finds it, which hangs ranks,
        # and its loop reads the answer back from the device at every step.
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def elapsed(self) -> float:
        """Wall-clock seconds of training without validation, over all resumes."""
        return self.seconds + (time.monotonic() - self._since if self._since else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._saved_step = time.monotonic(), trainer.global_step
        listen(self.on_signal)  # again, should anything have replaced our handlers since
        self._asked = self._ask_at = trainer.global_step
        self._asked_at = time.monotonic()
        if trainer.world_size > 1:
            self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        if trainer.is_global_zero:
            self._set_aside(trainer)
        if self._agreed(trainer):
            raise Interrupted(f"stopped before step {trainer.global_step + 1}")

    def _set_aside(self, trainer: Trainer) -> None:
        """Later checkpoints are damaged or of an abandoned branch: they must not win again."""
        folder = self._folder(trainer)
        for path in folder.glob("step-*.ckpt"):
            if checkpoints.step_of(path) > trainer.global_step:
                path.rename(path.with_name(path.name + ".aside"))
        for path in folder.glob(".step-*.tmp"):  # of a job that was killed while it wrote
            path.unlink()

    def on_signal(self, number: int, frame: Any) -> None:
        """A handler for the time of training, which stops at the next step border."""
        # Only a flag: a handler may run in the middle of anything. A second Ctrl-C does not wait.
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step == trainer.max_steps:
            return  # saved at the end: a run with its last checkpoint has been validated there
        interrupted = self._agreed(trainer)
        if interrupted or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if interrupted:
            raise Interrupted(f"stopped at step {trainer.global_step} of {trainer.max_steps}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self._since = self.elapsed(), 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def _agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._signalled
        if (step := trainer.global_step) < self._ask_at:
            return False
        now, gap = time.monotonic(), step - self._asked
        mine = [float(self._signalled), (now - self._asked_at) / max(1, gap)]
        told = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        signalled, seconds = told.tolist()
        # At most twice the last gap: the first steps are no measure of those to come.
        self._ask_at = step + max(1, min(2 * gap, int(self.ASK_EVERY / max(seconds, 1e-6))))
        self._asked, self._asked_at = step, now
        return bool(signalled)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self.record(trainer)

    def record(self, trainer: Trainer) -> None:
        """Writes ``done.json`` if training has reached its last step."""
        if not trainer.is_global_zero or trainer.global_step < trainer.max_steps:
            return
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
            if not checkpoints.finite(value):
                raise FloatingPointError(
                    f"{pl_module.job} diverged: {name} is not finite at step "
                    f"{trainer.global_step}; the checkpoints before are whole: start another study "
                    "from one (model.init_from), with a lower learning rate or clipped gradients"
                )
