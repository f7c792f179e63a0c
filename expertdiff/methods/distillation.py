"""Networks that learn from a finished model beside, or instead of, the data."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.bundle import Bundle
from expertdiff.data.base import Batch
from expertdiff.describe import describe, differences
from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.objective import Losses, losses
from expertdiff.diffusion.partition import Interval
from expertdiff.files import sha256_of
from expertdiff.methods.base import Method
from expertdiff.methods.mdm import MDM
from expertdiff.methods.single import Diffusion
from expertdiff.seeds import generator


class Teacher:
    """A frozen denoiser beside a method: no part of its weights, averages or checkpoints.

    Args:
        denoiser: the finished model.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)

    def told(self, method: Method, batch: Batch, t: Tensor, eps: Tensor) -> Prediction:
        """What it says about the items at t [B] and eps [B, ...]."""
        self.denoiser.to(batch.x0.device)  # once: there it is nothing to do
        with torch.no_grad():
            x_t = method.process.add_noise(method.mapped(batch.x0), eps, t)
            return self.denoiser(x_t, t, batch.y if method.network.num_classes else None)

    def error(
        self, method: Method, prediction: Prediction, batch: Batch, t: Tensor, eps: Tensor
    ) -> Tensor:
        """The squared distance [B] of the network's output from what the teacher would put out."""
        told, kind = self.told(method, batch, t, eps), method.denoiser.prediction
        return losses(prediction, kind, method.process, told.x0, told.eps, t).mse


class Distillation(Diffusion):
    """One network that learns what a bundle says: experts of any kind in one.

    The loss is |eps - eps_teacher|^2 at x_t of real data, or what that is for x0 or v. Validation
    tells the usual loss on data, so that it can be compared with that of others, and a learned
    variance goes by the data. A step costs a third more than one on data.

    Args:
        teacher: the bundle's folder.
        kwargs: see `Method`.

    Raises:
        ValueError: a teacher of another noise process.
    """

    def __init__(self, teacher: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = Teacher(Bundle.load(teacher).denoiser)
        self._taught_by = sha256_of(Path(teacher) / "manifest.json")
        theirs = describe(self.teacher.denoiser.process)
        if changed := differences(describe(self.process), theirs, "process"):
            raise ValueError(
                f"{teacher} knows other noise than the network is to learn ({'; '.join(changed)}): "
                "train with the teacher's process"
            )
        if self.teacher.denoiser.flow is not None:
            raise ValueError(f"{teacher} denoises behind a flow: distil a model without one")

    @property
    def job(self) -> str:
        return "distilled"

    def learned(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, Prediction | None]:
        (_, vb), prediction = self.losses(batch, t, eps)
        return Losses(self.teacher.error(self, prediction, batch, t, eps), vb), prediction

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"teacher": self._taught_by}


class Decoupled(MDM):
    """An expert to be merged: tuned on its interval, held near the network that it starts from.

    Decouple-then-Merge (DeMe, arXiv 2410.06664). The loss is |e - eps|^2 + keep |e - e_0|^2, with
    e_0 of the network in `init_from`; some whole batches draw t from the whole chain. The result is
    an expert as MDM's, or, with the others, one network: `expertdiff merge`.

    Args:
        keep: how much the distance from the first network counts.
        elsewhere: the probability that a batch is of the whole chain, in [0, 1].
        kwargs: see `Method`; `init_from` must be given.

    Raises:
        ValueError: nothing to start from, timesteps that learn, or a number out of its range.
    """

    def __init__(self, keep: float = 1.0, elsewhere: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if keep < 0 or not 0 <= elsewhere <= 1:
            raise ValueError(
                f"keep {keep} must not be negative, and elsewhere {elsewhere} must be in [0, 1]"
            )
        if self.timesteps.learns:
            raise ValueError(
                f"{type(self.timesteps).__name__} learns from one interval, and Decoupled also "
                "draws from others: use Uniform timesteps"
            )
        if self.init_from is None:
            raise ValueError(
                "Decoupled tunes a network that is there: name its run, checkpoint or file with "
                "model.init_from"
            )
        self.keep, self.elsewhere = keep, elsewhere
        self.teacher = Teacher(copy.deepcopy(self.denoiser))  # before a checkpoint replaces it

    def drawn(self, seed: int, key: tuple[int | str, ...]) -> list[Interval]:
        coin = generator("cpu", seed, "elsewhere", self.job, self.trainer.global_step)
        return [Interval() if torch.rand((), generator=coin) < self.elsewhere else self.interval]

    def learned(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, Prediction | None]:
        (mse, vb), prediction = self.losses(batch, t, eps)
        if self.keep:
            mse = mse + self.keep * self.teacher.error(self, prediction, batch, t, eps)
        return Losses(mse, vb), prediction

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"keep": self.keep, "elsewhere": self.elsewhere}
