"""Real against generated: the classifier that guides a finished model (arXiv 2211.17091)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from expertdiff import checkpoints
from expertdiff.checkpoints import AVERAGED, BEST
from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Logit
from expertdiff.diffusion.objective import Losses
from expertdiff.diffusion.timesteps import UniformLogSNR
from expertdiff.methods.mdm import MDM

NONE = torch.finfo(torch.float32).max
"""The cross-entropy of no weights at all: finite, as all weights must be."""


class Discrimination(MDM):
    """A classifier of noised real items (label 1) against noised generated ones (0).

    Binary cross-entropy of the network's logit at t uniform in log-SNR. Of the validations of a
    run, the averaged weights with the lowest held-out cross-entropy are kept in ``best.ckpt``,
    which is what `stitch` takes. Its data are `RealAndGenerated`; `Discriminator` guides by it.

    Args:
        expert: which interval of the partition it judges; of the partition [0, 1], 0 judges all t.
        kwargs: see `Method`.

    Raises:
        ValueError: the partition has no such interval.
    """

    error = "bce"

    def __init__(self, expert: int = 0, **kwargs: Any) -> None:
        super().__init__(
            expert,
            prediction=Logit(),
            timesteps=UniformLogSNR(),
            seeds=None,
            init_from=None,
            **kwargs,
        )
        # A buffer, so that a resumed run knows it.
        self.register_buffer("best", torch.tensor(NONE))

    @property
    def job(self) -> str:
        return f"discriminator-{self.expert}"

    def made_of(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(1,)]

    def losses(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, None]:
        x_t = self.process.add_noise(batch.x0, eps, t)
        logit = self.denoiser.output(x_t, t, None).squeeze(1).float()
        bce = F.binary_cross_entropy_with_logits(logit, batch.y.float(), reduction="none")
        return Losses(bce, torch.zeros_like(bce)), None

    def on_train_start(self) -> None:
        # As the file has it, because a checkpoint is of before the validation of its step.
        try:
            kept = checkpoints.load(self._file)
        except ValueError:  # there is none, or a kill came while it was written
            self.best.fill_(NONE)
            return
        if kept["global_step"] <= self.trainer.global_step:  # else it is of an abandoned branch
            self.best.copy_(kept[AVERAGED]["best"])

    @property
    def _file(self) -> Path:
        return Path(self.trainer.default_root_dir) / BEST

    def on_validation_start(self) -> None:
        self._sums = torch.zeros(2, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[int, tuple[Tensor, Tensor]]:
        result = super().validation_step(batch, batch_idx)
        for bce, _ in result.values():
            self._sums += torch.stack([bce.sum(), bce.new_tensor(len(bce))])
        return result

    def on_validation_end(self) -> None:  # after the callbacks', when all weights are back
        total, count = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        if self.trainer.state.fn == TrainerFn.FITTING and total / count < self.best:
            self.best.copy_(total / count)
            self.trainer.save_checkpoint(self._file)
