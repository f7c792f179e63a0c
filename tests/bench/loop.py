"""What the training loop costs outside forward, backward and optimizer.

``python tests/bench/loop.py`` trains a network of about 10M parameters at batch 128 through the
front door (data, EMA, logging, callbacks and all) and compares the time of a step with the time
inside forward, backward and optimizer, both in one run. The bar is 5 %.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from expertdiff.callbacks.checkpoint import ExactCheckpoint
from expertdiff.callbacks.ema import EMA
from expertdiff.callbacks.monitor import LossByInterval
from expertdiff.data.images import Images
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.loggers import JsonLines
from expertdiff.methods.single import Diffusion
from expertdiff.networks.unet import ADMUNet


class Noise32(Images):
    """Random images of CIFAR-10's shape."""

    shape = (3, 32, 32)

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(256, (5000, *self.shape), dtype=torch.uint8)
        return images, torch.zeros(len(images), dtype=torch.int64)


class Clock(Callback):
    """Time between steps, and inside ``training_step`` + backward + optimizer."""

    def __init__(self, module: Diffusion) -> None:
        self.steps, self.inside, self.last, self.began = [], [], None, 0.0
        inner = module.optimizer_step

        def timed(*args: Any, **kwargs: Any) -> Any:  # its closure runs forward and backward
            began = self._now()
            result = inner(*args, **kwargs)
            self.inside.append(self._now() - began)
            return result

        module.optimizer_step = timed

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        now = self._now()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now


def method() -> Diffusion:
    """A network of about 10M parameters, as `fit` trains it."""
    network = ADMUNet(32, model_channels=80, num_res_blocks=2, channel_mult=(1, 2, 2),
                      attention_resolutions=(8,), learn_sigma=False)  # fmt: skip
    return Diffusion(
        network=network,
        process=DiscreteVP(CosineBetas()),
        prediction=Eps(),
        timesteps=Uniform(),
        weighting=Simple(),
        partition=Partition([0, 0.1, 0.8, 1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-4, fused=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    module = method()
    clock = Clock(module)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=args.steps + 2,
            max_epochs=-1,
            precision="bf16-mixed",
            default_root_dir=folder,
            callbacks=[clock, LossByInterval(), EMA(), ExactCheckpoint(10**6)],
            logger=JsonLines(folder),
            log_every_n_steps=1,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Noise32(args.batch, 1000, "validation", flip=True))
    steps, inside = clock.steps[1:], clock.inside[2:]
    outside = [1 - b / a for a, b in zip(steps, inside)]
    millions = sum(p.numel() for p in module.network.parameters()) / 1e6
    print(f"\n{millions:.1f}M parameters, batch {args.batch}, logging at every step")
    print(f"step: {1e3 * statistics.median(steps):.0f} ms")
    print(f"forward, backward, optimizer: {1e3 * statistics.median(inside):.0f} ms")
    print(f"everything else: {100 * statistics.median(outside):.1f} % (bar: at most 5 %)")


if __name__ == "__main__":
    main()
