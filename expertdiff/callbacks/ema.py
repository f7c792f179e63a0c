"""The averaged weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from expertdiff import checkpoints
from expertdiff.checkpoints import AVERAGED, RAW


class EMA(Callback):
    """Exponential moving average of the model's weights: validated, checkpointed and shipped.

    ADM's recurrence from the initial weights on: ema = decay ema + (1 - decay) theta, after each
    optimizer step. Checkpoints hold the average as ``state_dict``, the raw weights beside it; what
    is trained beside the model, such as a critic, has no average and stands in both as it is.
    (Lightning's own WeightAveraging keeps its copy where the model is before it moves to the
    device, starts at the first update, and reads a counter from the device each step.)

    Args:
        decay: of the average, in [0, 1); 0 keeps the raw weights.
        warmup: use at most (1 + n) / (10 + n) at step n, so that a short run does not measure its
            random start.
        every: update after steps 1, 1 + every, 1 + 2 every, ... only.
        power: instead of that warmup, copy the weights for 100 steps and at the next update, then
            use at most 1 - (n - 100)^-power (ema_pytorch's; DualDiff has 2/3).
    """

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = False,
        every: int = 1,
        power: float | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} must be in [0, 1)")
        if every < 1:
            raise ValueError(f"ema every {every} steps never happens: give 1 or more")
        if warmup and power is not None:
            raise ValueError(f"ema has warmup and power {power}: choose one of them")
        self.decay, self.warmup, self.every, self.power = decay, warmup, every, power
        self._average: list[Tensor] = []
        self._loaded: dict[str, Tensor] | None = None
        self._updates = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = model_parameters(pl_module)
        source = self._loaded or {name: parameter.data for name, parameter in named.items()}
        # torch.empty_like + copy_ keeps the parameter's device and memory format.
        self._average = [torch.empty_like(p.data).copy_(source[name]) for name, p in named.items()]
        self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._updates:
            return  # in the middle of an accumulation
        self._updates = n = trainer.global_step
        if (n - 1) % self.every:
            return
        parameters = [parameter.data for parameter in pl_module.denoiser.parameters()]
        with torch.no_grad():
            get_ema_multi_avg_fn(self.decay_at(n))(self._average, parameters, n)

    def decay_at(self, n: int) -> float:
        """The decay of the update after optimizer step n, the first being 1."""
        if self.power is not None:
            copies = n - 1 <= 100 + self.every
            return 0.0 if copies else min(self.decay, 1 - (n - 100) ** -self.power)
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exchange(pl_module)

    def _exchange(self, pl_module: LightningModule) -> None:
        parameters = pl_module.denoiser.parameters()
        for i, parameter in enumerate(parameters if self._average else ()):
            parameter.data, self._average[i] = self._average[i], parameter.data

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RAW] = checkpoint[AVERAGED]
        averages = zip(model_parameters(pl_module), self._average)
        checkpoint[AVERAGED] = checkpoint[RAW] | dict(averages)
        checkpoint.setdefault(checkpoints.IDENTITY, {})["ema"] = self._identity()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # the average is what is validated
        checkpoints.same_run({"ema": self._identity()}, checkpoint)
        pl_module.load_state_dict(checkpoint[RAW])
        self._loaded = checkpoint[AVERAGED]
        self._updates = checkpoint["global_step"]

    def _identity(self) -> dict[str, Any]:
        names = ("decay", "warmup", "every", "power")
        return {name: getattr(self, name) for name in names}


def model_parameters(method: LightningModule) -> dict[str, Tensor]:
    """The parameters of what a method trains to denoise, by their names in the method."""
    return dict(method.denoiser.named_parameters(prefix="denoiser"))
