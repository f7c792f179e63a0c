"""Our training step of ADM's CIFAR-10 network against the plain way, interleaved in one run.

Ours: bf16 autocast, channels_last, fused attention, fused AdamW, one multi-tensor EMA update.
Plain: float32, contiguous, explicit softmax attention with checkpointing, AdamW and EMA parameter
by parameter. The ratio is what counts; it depends on the processor's bf16 (AMX, tensor cores).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from ours import fit_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.methods.single import Diffusion
from expertdiff.networks.unet import ADMUNet, AttentionBlock

DECAY = 0.9999


class PlainAttention(nn.Module):
    """`AttentionBlock` with the softmax written out, recomputed in the backward pass."""

    def __init__(self, block: AttentionBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False)

    def attend(self, x: Tensor) -> Tensor:
        block, h = self.block, x.flatten(2)
        q, k, v = block.qkv(block.norm(h)).unflatten(1, (block.num_heads, 3, -1)).unbind(2)
        scale = q.shape[2] ** -0.25
        weights = torch.einsum("bhdq,bhdk->bhqk", q * scale, k * scale).softmax(dim=-1)
        out = torch.einsum("bhqk,bhdk->bhdq", weights, v).flatten(1, 2)
        return x + block.proj_out(out).view_as(x)


def plain_step(net: nn.Module, x_t: Tensor, t: Tensor, target: Tensor) -> Callable[[], None]:
    for blocks in [*net.input_blocks, net.middle_block, *net.output_blocks]:
        for i, block in enumerate(blocks):
            if isinstance(block, AttentionBlock):
                blocks[i] = PlainAttention(block)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=False)
    ema = [p.detach().clone() for p in net.parameters()]

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(net(x_t, t), target).backward()
        optimizer.step()
        for average, parameter in zip(ema, net.parameters()):
            average.mul_(DECAY).add_(parameter.detach(), alpha=1 - DECAY)

    return step


def our_step(net: nn.Module, images: Tensor) -> Callable[[], None]:
    """What ``fit`` runs: the method's own training step (both losses), optimizer and average."""
    module = Diffusion(
        network=net,
        process=DiscreteVP(CosineBetas()),
        prediction=Eps(),
        timesteps=Uniform(),
        weighting=Simple(),
        partition=Partition([0, 0.1, 0.8, 1]),
    ).to(images.device)
    index = torch.arange(len(images), device=images.device)
    make = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    return fit_step(module, make, Batch(images, index, index))


def seconds(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall-clock and processor time of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (after one)")
    parser.add_argument("--dropout", type=float, default=0.3, help="of the residual blocks")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = ADMUNet(32, dropout=args.dropout).to(device)
    inputs = (
        torch.randn(args.batch, 3, 32, 32, device=device),
        torch.randint(1000, (args.batch,), device=device),
        torch.randn(args.batch, 6, 32, 32, device=device),
    )
    steps = {"plain": plain_step(copy.deepcopy(net), *inputs), "ours": our_step(net, inputs[0])}
    times = {name: [] for name in steps}
    for _ in range(args.steps + 1):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    print(f"{device}, {torch.get_num_threads()} threads, batch {args.batch}, {args.steps} steps")
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:])]
        for name, rows in times.items()
    }
    for name, (wall, cpu) in medians.items():
        print(
            f"{name:6} {wall:7.2f} s/step  {cpu:7.2f} cpu s/step {args.batch / wall:8.2f} images/s"
        )
    wall, cpu = (plain / ours for plain, ours in zip(medians["plain"], medians["ours"]))
    print(
        f"ratio  {wall:7.2f}         {cpu:7.2f} (of processor time, where others share the cores)"
    )


if __name__ == "__main__":
    main()
