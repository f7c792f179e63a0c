"""What low precision changes: the error of a denoiser by interval, from the same noise.

``python tests/bench/precision.py BUNDLE`` noises held-out digits, each image at 8 timesteps of each
interval, and compares what a bundle without labels says of the noise in bf16, from int8 weights,
and in both, with what it says in float32: |eps - eps32| / |eps32|. Beside it is the error of the
model itself, |eps32 - eps| / |eps|.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from expertdiff.bundle import Bundle
from expertdiff.data.images import Digits
from expertdiff.devices import default_device
from expertdiff.diffusion.denoiser import Denoiser

TIMES = 8


@torch.no_grad()
def said(denoiser: Denoiser, x_t: Tensor, t: Tensor, bf16: bool) -> Tensor:
    """The eps of a denoiser, on the CPU."""
    device = default_device()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        parts = [
            denoiser(x.to(device), at).eps.cpu() for x, at in zip(x_t.split(256), t.split(256))
        ]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()

    whole = Bundle.load(args.bundle)
    with tempfile.TemporaryDirectory() as name:
        int8 = Bundle.quantize(args.bundle, Path(name) / "int8").denoiser.to(default_device())
    float32, process = whole.denoiser.to(default_device()), whole.denoiser.process
    data = Digits()
    x0 = data.scaled(data.split("validation")[0][: args.images])
    u = ((torch.arange(TIMES) + 0.5) / TIMES).repeat_interleave(len(x0))
    x0 = x0.repeat(TIMES, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    ways = {"bf16": (float32, True), "int8": (int8, False), "both": (int8, True)}
    for interval in whole.partition.intervals():
        t = process.times(u, interval)
        x_t = process.add_noise(x0, eps, t)
        exact = said(float32, x_t, t, False)
        errors = [
            f"{way} {(said(denoiser, x_t, t, bf16) - exact).norm() / exact.norm():.5f}"
            for way, (denoiser, bf16) in ways.items()
        ]
        own = (exact - eps).norm() / eps.norm()
        print(f"{str(interval):>10}: {', '.join(errors)}; of the model itself {own:.4f}")


if __name__ == "__main__":
    main()
