"""What serving costs: memory and time of a bundle with one expert in memory, against all of them.

``python tests/bench/serving.py`` draws the same images from a bundle of eight untrained experts:
resident, lazy, and lazy from int8 weights; a single expert is beside them. The bars for lazy are
the single expert's memory plus one, and 1.03 of the resident time.

Memory is the peak of a process for each above what it has before the bundle is loaded, in experts
of float32. Time is of chains in turn in one process, for of two processes with the same work one is
up to 6 % slower, by how its memory happens to lie; so look at more than one process, too.
"""

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expertdiff.bundle import Bundle
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Denoiser, Eps
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.files import sha256_of, write_json
from expertdiff.networks.unet import ADMUNet

SHAPE = (3, 16, 16)

Ways = dict[str, tuple[Path, bool]]
Times = dict[str, list[tuple[float, float]]]


def write(folder: Path, network: ADMUNet, experts: int) -> Path:
    """A bundle of so many networks with random weights."""
    folder.mkdir()
    edges, entries = [i / experts for i in range(experts + 1)], []
    for i, interval in enumerate(zip(edges, edges[1:])):
        weights = {k: 0.02 * torch.randn_like(v) for k, v in network.state_dict().items()}
        file = folder / f"{i:02d}.safetensors"
        save_file(weights, file)
        entry = {"interval": interval, "file": file.name, "sha256": sha256_of(file), "step": 1}
        entries.append(entry | {"identity": {"interval": interval}})
    shared = {
        "process": describe(DiscreteVP(CosineBetas())),
        "prediction": describe(Eps()),
        "network": describe(network),
        "data": {"shape": SHAPE, "scale": "[-1, 1]"},
    }
    manifest = {"format": 1, "partition": edges, "shared": shared, "experts": entries}
    write_json(folder / "manifest.json", manifest)
    return folder


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    # Not ru_maxrss, which a process inherits from the one that starts it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a process of its own, because memory that was had once counts for ever."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def chain(denoiser: Denoiser, images: int, steps: int) -> float:
    """Draws images; their mean, which tells whether two chains are the same."""
    noise = SampleNoise(0, range(images), SHAPE, "cpu")
    return DDIM(steps)(denoiser, noise).double().mean().item()


def memory(folder: Path, lazy: bool, images: int) -> tuple[int, float]:
    """Bytes that a bundle takes in this process, loaded and drawing; seconds to load it."""
    torch.set_num_threads(1)
    chain(Bundle.load(folder.parent / "tiny").denoiser, images, 2)
    before, start = peak(), time.perf_counter()
    denoiser = Bundle.load(folder, lazy).denoiser
    loaded = time.perf_counter() - start
    chain(denoiser, images, 2 * len(denoiser.partition))
    return peak() - before, loaded


def times(ways: Ways, images: int, steps: int, runs: int) -> Times:
    """Seconds of each way's chains, by the clock and of the processor, in turn in this process."""
    torch.set_num_threads(1)
    denoisers = {way: Bundle.load(*arguments).denoiser for way, arguments in ways.items()}
    found: Times = {way: [] for way in ways}
    for _ in range(runs):
        means = {}
        for way, denoiser in denoisers.items():
            wall, processor = time.perf_counter(), time.process_time()
            means[way] = chain(denoiser, images, steps)
            spent = time.perf_counter() - wall, time.process_time() - processor
            found[way].append(spent)
        assert means["resident"] == means["lazy"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--channels", type=int, default=128, help="of the ADM UNet")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3, help="in which time is measured")
    parser.add_argument("--runs", type=int, default=3, help="in each of them")
    args = parser.parse_args()

    network = ADMUNet(16, 3, args.channels, 1, [1, 2, 2], [8], learn_sigma=False)
    one = 4 * sum(p.numel() for p in network.parameters())
    print(
        f"{args.experts} experts of {one / 4e6:.1f}M parameters; {args.images} images of {SHAPE}, "
        f"DDIM with {args.steps} steps, one thread"
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "tiny", ADMUNet(16, 3, 32, 1, [1], [], learn_sigma=False), 1)
        write(root / "bundle", network, args.experts)
        write(root / "single", network, 1)
        Bundle.quantize(root / "bundle", root / "int8")
        sizes = [sum(f.stat().st_size for f in (root / n).glob("*.s*")) for n in ("bundle", "int8")]
        print(f"float32 / int8 files: {sizes[0] / sizes[1]:.2f}")
        ways: Ways = {
            "single": (root / "single", False),
            "resident": (root / "bundle", False),
            "lazy": (root / "bundle", True),
            "lazy, int8": (root / "int8", True),
        }
        for way, arguments in ways.items():
            peak_of, load = alone(memory, *arguments, args.images)
            print(f"{way:>11}: {peak_of / one:5.2f} experts of memory, loaded in {load:.2f} s")
        arguments = (ways, args.images, args.steps, args.runs)
        rounds = [alone(times, *arguments) for _ in range(args.processes)]
    for way in ways:
        clock, processor = (
            [statistics.median(a[i] / b[i] for a, b in zip(r[way], r["resident"])) for r in rounds]
            for i in (0, 1)
        )
        print(
            f"{way:>11}: {statistics.median(clock):.3f} of resident by the clock (processes: "
            f"{min(clock):.3f} to {max(clock):.3f}), {statistics.median(processor):.3f} of the "
            "processor"
        )


if __name__ == "__main__":
    main()
