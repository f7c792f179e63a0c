"""What mixing costs: a Remix-DiT against the plain DiT of its size, in turn in one run.

``python tests/bench/remix.py`` times a training step (bf16, fused AdamW, average and all), the
mixing alone against the plain way (multiply and sum in every layer), and a respaced chain. The bars
are 1.08 for a step at batch 64, 1.04 at 256, 2 for the mixing and 1.02 for 250 steps. A plain copy
of the bytes that any exact mixing must move tells how much there is to gain. On a CPU, much of the
time of multiply and sum is page faults; with ``MALLOC_TRIM_THRESHOLD_=8589934592`` and
``MALLOC_MMAP_MAX_=0`` the process keeps its memory, as it does on a GPU. ``--compiled`` compiles
the blocks of both and our mixing, for which there has to be a compiler.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from ours import fit_step
from torch import Tensor
from train_step import seconds

from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDPM, SampleNoise
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.experts.remixed import RemixDiT
from expertdiff.methods.base import Method
from expertdiff.methods.remix import Remix
from expertdiff.methods.single import Diffusion
from expertdiff.networks.dit import DiT

GIB = 2**30
Mix = Callable[[RemixDiT, int], dict[str, Tensor]]


def training(cls: type[Method], network: torch.nn.Module, batch: Batch) -> Callable[[], None]:
    """What ``fit`` runs: the method's own training step, the optimizer and the average."""
    module = cls(
        network=network,
        process=DiscreteVP(LinearBetas()),
        prediction=Eps(),
        timesteps=Uniform(),
        weighting=Simple(),
        partition=Partition([0, 1]),
    ).to(batch.x0.device)
    make = partial(torch.optim.AdamW, lr=2e-5, weight_decay=0, fused=True)
    data = SimpleNamespace(batch_size=len(batch.x0), split=lambda name: (batch.x0, batch.y))
    return fit_step(module, make, batch, datamodule=data)


def multiplied_and_summed(network: RemixDiT, expert: int) -> dict[str, Tensor]:
    """What `RemixDiT.mix` gives, the plain way."""
    weights = {}
    for name, stack in network.stacks().items():
        alpha = network.coefficients.of(expert)[0]  # in every layer
        total = (stack * alpha.view(-1, *[1] * (stack.ndim - 1))).sum(0)
        weights[name] = total.bfloat16() if name.endswith(network.cast) else total
    return weights


def mixing(network: RemixDiT, mix: Mix, backward: bool) -> Callable[[], None]:
    """One expert's weights as in training, and perhaps back to gradients of bases and logits."""
    autocast = torch.autocast(network.coefficients.weight.device.type, torch.bfloat16)
    with autocast:
        gradients = [torch.randn_like(weight) for weight in network.mix(7).values()]

    def step() -> None:
        network.zero_grad()
        with autocast:
            weights = mix(network, 7)
        if backward:
            torch.autograd.backward(list(weights.values()), gradients)

    return step


def mixing_in_a_chain(network: RemixDiT, mix: Mix, calls: int) -> Callable[[], None]:
    """The weights for each call of a chain, from noise to data."""
    experts = [call * len(network.partition) // calls for call in reversed(range(calls))]

    @torch.no_grad()
    def draw() -> None:
        with torch.autocast(network.coefficients.weight.device.type, torch.bfloat16):
            for expert in experts:
                mix(network, expert)

    return draw


def copying(network: RemixDiT, backward: bool) -> Callable[[], None]:
    """Moves as many bytes as any exact mixing must.

    Bases in, an expert out in bf16; then its gradient and the bases in, the gradients of these out.
    """
    stacks = list(network.stacks().values())
    bases = sum(4 * stack.numel() for stack in stacks)
    expert = sum(2 * stack[0].numel() for stack in stacks)
    moved = bases + expert + backward * (expert + 2 * bases)
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=stacks[0].device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def sampling(network: torch.nn.Module, images: int, steps: int, device: str) -> Callable[[], None]:
    network = network.eval().requires_grad_(False)
    denoiser = NetworkDenoiser(network, DiscreteVP(LinearBetas()), Eps()).to(device)
    noise = SampleNoise(0, range(images), (4, 32, 32), device)
    y = torch.arange(images, device=device)

    def draw() -> None:
        with torch.autocast(device, torch.bfloat16):
            DDPM(steps, clip=False)(denoiser, noise, y)

    return draw


def compare(title: str, steps: dict[str, Callable[[], None]], runs: int, device: str) -> None:
    """Times each in turn, to and fro; prints medians, and ratios of wall-clock and processor time.

    A machine that slows down while it is measured takes as much from the first as from the last.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name in reversed(steps) if run % 2 else steps:
            times[name].append(seconds(steps[name], device))
    medians = {
        name: [statistics.median(column) for column in zip(*rows[1:])]
        for name, rows in times.items()
    }
    print(title)
    for name, (wall, cpu) in medians.items():
        print(f"  {name:24} {1e3 * wall:9.1f} ms {1e3 * cpu:9.1f} ms of processor")
    first, second, *_ = medians.values()
    ratios = [b / a for a, b in zip(first, second)]
    print(f"  ratio {ratios[0]:.3f}, of processor time {ratios[1]:.3f}")


def memory(network: torch.nn.Module) -> float:
    """GiB of parameters, gradients, two moments and an average, all float32."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return 5 * 4 * trained / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S", help="of the DiT")
    parser.add_argument("--batch", type=int, default=64, help="latents a training step")
    parser.add_argument("--steps", type=int, default=5, help="timed training steps")
    parser.add_argument("--images", type=int, default=1, help="latents drawn at a time")
    parser.add_argument("--calls", type=int, default=250, help="of the network in a chain")
    parser.add_argument("--chains", type=int, default=1, help="timed chains; 0 for none")
    parser.add_argument("--compiled", action="store_true", help="the blocks and our mixing")
    parser.add_argument("--bases", type=int, default=4)
    parser.add_argument("--experts", type=int, default=20)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, DiT-{args.size}/2, ", end="")
    print(f"{args.experts} experts of {args.bases} bases")
    torch.manual_seed(0)
    plain = DiT(size=args.size, compiled=args.compiled).to(device)
    mixed = RemixDiT(plain, bases=args.bases, experts=args.experts).to(device)
    print(f"training state: DiT {memory(plain):.2f} GiB, Remix {memory(mixed):.2f} GiB")
    twin = copy.deepcopy(mixed)  # since each way has to free the gradients of its own last step
    for title, backward in (("mixing", False), ("mixing, forward and backward", True)):
        ways = {
            "ours": mixing(mixed, RemixDiT.mix, backward),
            "multiply and sum": mixing(twin, multiplied_and_summed, backward),
            "a copy of as many bytes": copying(mixed, backward),
        }
        compare(title, ways, 20, device)
    del twin
    mixed.zero_grad()
    if args.steps:
        y = torch.randint(1000, (args.batch,), device=device)
        batch = Batch(torch.randn(args.batch, 4, 32, 32, device=device), y, y)
        ways = {"DiT": training(Diffusion, plain, batch), "Remix": training(Remix, mixed, batch)}
        compare(f"training step of {args.batch}", ways, args.steps, device)
        del ways
    if args.chains:
        ways = {
            name: sampling(network, args.images, args.calls, device)
            for name, network in (("DiT", plain), ("Remix", mixed))
        }
        compare(f"{args.calls} calls on {args.images} latents", ways, args.chains, device)
        ways = {
            "ours": mixing_in_a_chain(mixed, RemixDiT._weights, args.calls),
            "multiply and sum": mixing_in_a_chain(mixed, multiplied_and_summed, args.calls),
        }
        compare(f"mixing for {args.calls} calls", ways, args.chains, device)


if __name__ == "__main__":
    main()
