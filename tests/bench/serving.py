"""What serving costs: memory and time of a bundle with one expert in memory, against all of them.

``python tests/bench/serving.py`` draws the same images from a bundle of eight untrained experts,
in a process of its own each: resident, lazy, and lazy from int8 weights; a single expert is beside
them. Memory is the peak of the process above what it has before the bundle is loaded, in experts of
float32. The bar for lazy is the single expert's memory plus one, and 1.03 of the resident time; on
a busy machine look at processor time, which counts the reading thread, too.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from expertdiff.bundle import Bundle
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.process import CosineBetas, DiscreteVP
from expertdiff.diffusion.samplers import DDIM, SampleNoise
from expertdiff.files import sha256_of, write_json
from expertdiff.networks.unet import ADMUNet

SHAPE = (3, 16, 16)


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


def draw(folder: Path, lazy: bool, images: int, steps: int) -> str:
    """Loads and samples in this process; what it took, as JSON."""
    torch.set_num_threads(1)
    DDIM(2)(Bundle.load(folder.parent / "tiny").denoiser, SampleNoise(0, [0], SHAPE, "cpu"))
    before, cpu = peak(), time.process_time()
    denoiser = Bundle.load(folder, lazy).denoiser
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    noise = SampleNoise(0, range(images), SHAPE, "cpu")
    mean = DDIM(steps)(denoiser, noise).double().mean().item()
    wall, processor = time.perf_counter() - loaded, time.process_time() - loaded_cpu
    return json.dumps(
        {
            "mean": mean,
            "memory": peak() - before,
            "load": loaded_cpu - cpu,
            "wall": wall,
            "processor": processor,
            "all": time.process_time() - cpu,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--channels", type=int, default=128, help="of the ADM UNet")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
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
        ways = {
            "single": (root / "single", False),
            "resident": (root / "bundle", False),
            "lazy": (root / "bundle", True),
            "lazy, int8": (root / "int8", True),
        }
        found = {way: [] for way in ways}
        for _ in range(args.runs):
            for way, arguments in ways.items():
                # A process each, because memory that was had once counts for ever.
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    text = pool.apply(draw, (*arguments, args.images, args.steps))
                found[way].append(json.loads(text))
            assert found["resident"][-1]["mean"] == found["lazy"][-1]["mean"]
    for way, runs in found.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = {
            key: statistics.median(run[key] / r[key] for run, r in zip(runs, found["resident"]))
            for key in ("wall", "processor", "all")
        }
        print(
            f"{way:>11}: {median['memory'] / one:5.2f} experts of memory; sampling "
            f"{median['processor']:.1f} s of processor, {ratios['processor']:.3f} of resident "
            f"(wall clock {ratios['wall']:.3f}, processor with loading {ratios['all']:.3f})"
        )


if __name__ == "__main__":
    main()
