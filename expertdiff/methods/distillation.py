"""Networks that learn from a finished model beside, or instead of, the data."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.bundle import Bundle, check_data
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
        # What routes looks at t, which costs one wait for the device then, not one an expert.
        self._routes = len(denoiser.partition) > 1

    def to(self, device: torch.device) -> None:
        """Moves it, once before training."""
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        self.denoiser.to(device, memory_format=layout)

    def error(
        self, method: Method, prediction: Prediction, batch: Batch, t: Tensor, eps: Tensor
    ) -> Tensor:
        """The squared distance [B] of the network's output from what the teacher would put out."""
        x_t = method.process.add_noise(method.mapped(batch.x0), eps, t)
        y = batch.y if method.network.num_classes else None
        with torch.no_grad():
            told = self.denoiser(x_t, t.cpu() if self._routes else t, y)
        kind = method.denoiser.prediction
        return losses(prediction, kind, method.process, told.x0, told.eps, t).mse


class Distillation(Diffusion):
    """One network that learns what a bundle says: experts of any kind in one.

    The loss is |eps - eps_teacher|^2 at x_t of real data, or the same of x0 or v, whichever both of
    them predict. Validation tells the usual loss on data, which can be compared with that of other
    methods, and a learned variance goes by the data. A step costs a third more than one on data.

    Args:
        teacher: the bundle's folder.
        kwargs: see `Method`.

    Raises:
        ValueError: a teacher of another noise process, prediction or number of classes, or a flow
            in front of either. Later: one of other data.
    """

    def __init__(self, teacher: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bundle = Bundle.load(teacher)
        self.teacher = Teacher(self.bundle.denoiser)
        self._taught_by = sha256_of(Path(teacher) / "manifest.json")
        theirs = self.bundle.manifest["shared"]
        ours = {
            "process": describe(self.process),
            "prediction": describe(self.denoiser.prediction),
            "num_classes": self.network.num_classes,
        }
        theirs = {name: theirs.get(name, self.bundle.num_classes) for name in ours}
        if changed := differences(ours, theirs):
            raise ValueError(
                f"{teacher} is no teacher of this network ({'; '.join(changed)}): train with the "
                "teacher's process, prediction and classes"
            )
        if self.teacher.denoiser.flow or self.denoiser.flow:
            raise ValueError(
                f"what {teacher} says and the network learns must be about the data, not about "
                "what a flow makes of them: distil a model without a flow into one without"
            )

    @property
    def job(self) -> str:
        return "distilled"

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule.identity()
        check_data(self.bundle.folder, self.bundle.manifest["shared"]["data"], data)
        super().setup(stage)
        self.teacher.to(self.trainer.strategy.root_device)

    def learned(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Losses, Prediction | None]:
        (_, vb), prediction = self.losses(batch, t, eps)
        return Losses(self.teacher.error(self, prediction, batch, t, eps), vb), prediction

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"teacher": self._taught_by}


class Decoupled(MDM):
    """An expert to be merged: tuned on its interval, held near the network that it starts from.

    Decouple-then-Merge (DeMe, arXiv 2410.06664). The loss is |e - eps|^2 + keep |e - e_0|^2, with
    e_0 of the network in `init_from`; some whole batches draw t from the whole chain. The result is
    an expert as MDM's, or, with the others, one network: `expertdiff merge`. Training's mse is told
    with both terms, validation's with the first alone.

    Args:
        keep: how much the distance from the first network counts.
        elsewhere: the probability that a batch is of the whole chain, in [0, 1].
        kwargs: see `Method`; `init_from` must be given.

    Raises:
        ValueError: timesteps that cannot be drawn elsewhere, or a number out of its range. Later:
            nothing to start from.
    """

    def __init__(self, keep: float = 1.0, elsewhere: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if keep < 0 or not 0 <= elsewhere <= 1:
            raise ValueError(
                f"keep {keep} must not be negative, and elsewhere {elsewhere} must be in [0, 1]"
            )
        if self.timesteps.bound:
            raise ValueError(
                f"{type(self.timesteps).__name__} draws from one interval, and Decoupled also from "
                "others: use Uniform timesteps"
            )
        self.keep, self.elsewhere = keep, elsewhere
        self.teacher = Teacher(copy.deepcopy(self.denoiser))  # before a checkpoint replaces it

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init_from is None:
            raise ValueError(
                "Decoupled tunes a network that is there: name its run, checkpoint or file with "
                "model.init_from, or give study.shared iterations"
            )
        super().setup(stage)
        self.teacher.to(self.trainer.strategy.root_device)

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
