"""What checkpoints and the check for signals cost, and what it costs to validate a stitch.

``python tests/bench/checkpoint.py cost`` times what ExactCheckpoint does in a training of the 10M
network of loop.py: one checkpoint in 1,000 steps and the check at every step, as a share of 1,000
steps. The bar is 1 %. ``... stitch`` writes 8 experts of 53M parameters and times `Bundle.stitch`:
what its checks cost beside reading. The bar is 2 s. Both count the seconds of a core, not of a
clock, so that other programs do not matter.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from loop import Clock, Noise32, method

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, bundle, expert, files
from expertdiff.callbacks.checkpoint import ExactCheckpoint
from expertdiff.callbacks.ema import EMA
from expertdiff.describe import describe
from expertdiff.diffusion.partition import Partition
from expertdiff.methods.base import versions
from expertdiff.networks.unet import ADMUNet


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Inside, the seconds of each call of a function."""
    inner: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        result = inner(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return result

    setattr(owner, name, function)
    yield seconds
    setattr(owner, name, inner)


def cost(batch: int, steps: int) -> None:
    module = method()
    clock, keeper = Clock(module), ExactCheckpoint(steps // 2)
    clock._now = time.process_time
    with (
        tempfile.TemporaryDirectory() as folder,
        timed(ExactCheckpoint, "_save") as saves,
        timed(ExactCheckpoint, "_agreed") as checks,
    ):
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            precision="bf16-mixed",
            default_root_dir=folder,
            callbacks=[clock, EMA(), keeper],
            logger=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Noise32(batch, 1000, "validation", flip=True))
        size = checkpoints.newest(Path(folder) / "checkpoints").stat().st_size
    step, save = statistics.median(clock.inside), statistics.median(saves)
    check = statistics.median(checks)
    share = (save + 1000 * check) / (1000 * step)
    print(f"\nstep {1e3 * step:.0f} ms, checkpoint of {size / 1e6:.0f} MB {save:.2f} s, ", end="")
    print(f"check {1e6 * check:.1f} us: {100 * share:.2f} % of 1,000 steps (bar: 1 %)")


def experts(folder: Path) -> list[Path]:
    """Checkpoints of 8 experts, averaged and raw weights of 53M parameters each."""
    edges = [i / 8 for i in range(9)]
    module = method()
    network = ADMUNet(32, 3, 128, 3, (1, 2, 2, 2), (16, 8), num_head_channels=64, dropout=0.3)
    weights = {f"{expert.PREFIX}{key}": value for key, value in network.state_dict().items()}
    print(f"{sum(v.numel() for v in network.parameters()) / 1e6:.1f}M parameters an expert")
    data = Noise32(1, 1000, "validation", flip=True).identity()
    shared = {"process": describe(module.process), "network": describe(network), "data": data}
    paths = []
    for i, interval in enumerate(Partition(edges).intervals()):
        identity = {
            **shared,
            "prediction": describe(module.denoiser.prediction),
            "interval": [interval.lo, interval.hi],
            "partition": edges,
            "job": f"expert-{i}",
            "max_steps": 1,
            "ema": {"decay": 0.9999},
            "versions": versions(),
        }
        content = {checkpoints.AVERAGED: weights, checkpoints.RAW: weights, "global_step": 1}
        paths.append(folder / f"expert-{i}" / "checkpoints" / "step-00000001.ckpt")
        checkpoints.save(content | {checkpoints.IDENTITY: identity}, paths[-1])
    return [path.parents[1] for path in paths]


def stitch() -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        jobs = experts(folder)
        checks = (
            (expert, "check_weights"), (files, "check_weights"), (files, "_check_manifest"),
            (expert, "check_fit"), (bundle, "check_together"), (bundle, "_owners"),
        )  # fmt: skip
        spent = [stack.enter_context(timed(*check)) for check in checks]
        built = stack.enter_context(timed(bundle, "network_of"))
        checkpoints._digest.cache_clear()
        began = time.process_time()
        Bundle.stitch(jobs, folder / "bundle")
        whole = time.process_time() - began
        size = sum(path.stat().st_size for path in (folder / "bundle").iterdir()) / len(jobs)
    print(
        f"8 files of {size / 1e6:.0f} MB, seconds of one core: stitch {whole:.1f}, of which checks "
        f"{sum(map(sum, spent)):.2f} (bar: 2), networks built and filled {sum(built):.1f}, the "
        "rest reading, hashing, writing"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "stitch"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    cost(args.batch, args.steps) if args.what == "cost" else stitch()
