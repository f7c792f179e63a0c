"""Momentum that fades along the run."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from expertdiff.describe import Described


class MDLRC(Described, Callback):
    """Momentum decay with learning-rate compensation (arXiv 2404.07946), RECONSTRUCTED.

    At the fraction tau of the run beta_1 = b (1 - tau) / (1 - b tau), down to 0, and the learning
    rate lr (1 - b) / (1 - beta_1), which is lr (1 - b tau), where b and lr are the optimizer's. By
    third-party code; other code lets momentum fade otherwise.

    Args:
        momentum: false leaves momentum as it is and decays the learning rate alone: the control,
            without which MDLRC shows nothing.

    Raises:
        ValueError: at the start of training, a learning-rate scheduler beside it, or an optimizer
            without betas.
    """

    def __init__(self, momentum: bool = True) -> None:
        self.momentum = momentum

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            raise ValueError(
                "MDLRC sets the learning rate, and so does model.lr_scheduler: leave out one"
            )
        groups = groups_of(trainer)
        if not all("betas" in group for group in groups):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise ValueError(f"{names} has no betas for MDLRC to decay: use AdamW or Adam")
        # Before a checkpoint is restored, which has those of its own step.
        self._start = [(group["lr"], group["betas"]) for group in groups]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        tau = trainer.global_step / trainer.max_steps
        for group, (lr, (b, *rest)) in zip(groups_of(trainer), self._start):
            beta, scale = decayed(b, tau)
            group["lr"] = lr * scale
            group["betas"] = (beta if self.momentum else b, *rest)


def groups_of(trainer: Trainer) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def decayed(b: float, tau: float) -> tuple[float, float]:
    """beta_1, and what the learning rate is multiplied by, at the fraction tau of a run."""
    return b * (1 - tau) / (1 - b * tau), 1 - b * tau
