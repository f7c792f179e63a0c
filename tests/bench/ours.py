"""A step of ``fit`` without its loop, for the benches that time it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from expertdiff.callbacks.ema import EMA
from expertdiff.data.base import Batch
from expertdiff.methods.base import Method


def fit_step(
    module: Method, make: Callable[[Any], torch.optim.Optimizer], batch: Batch, **trainer: Any
) -> Callable[[], None]:
    """The method's own training step in bf16, optimizer and average.

    `make` is given the parameters of the module: it trains no network that it was built with, but
    one like it. `trainer` is what else the method asks its trainer for.
    """
    module._trainer = trainer = SimpleNamespace(
        global_step=0,
        max_steps=10**5,
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        **trainer,
    )
    optimizer = make(module.parameter_groups())
    ema = EMA()
    ema.on_fit_start(trainer, module)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(batch.x0.device.type, torch.bfloat16):
            loss = module.training_step(batch, trainer.global_step)["loss"]
        loss.backward()
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)

    return step
