"""Finished experts on disk as one model: stitched from training runs, verified, pickle-free."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from expertdiff.bundle.expert import Expert, check_fit, check_together, denoiser_of, network_of
from expertdiff.bundle.files import (
    SHARED,
    check_weights,
    read_manifest,
    read_tensors,
    read_weights,
)
from expertdiff.describe import build
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.experts.lazy import LazyExpert, Slot
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import replacing, sha256_of, write_json
from expertdiff.int8 import quantized
from expertdiff.networks.network import Network


class Bundle:
    """One denoiser from one or several experts.

    Args:
        denoiser: the model.
        manifest: what it is; plain data.
        folder: where it lies.
    """

    def __init__(self, denoiser: Denoiser, manifest: dict[str, Any], folder: Path) -> None:
        self.denoiser, self.manifest, self.folder = denoiser, manifest, folder

    @property
    def partition(self) -> Partition:
        """Who owns which part of the chain."""
        return Partition(self.manifest["partition"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W) of an image, (2,) of a point."""
        return tuple(self.manifest["shared"]["data"]["shape"])

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); ``None`` for an unconditional model."""
        return classes_of(self.denoiser)

    @property
    def weights(self) -> str:
        """What its files hold; loaded, all weights are float32."""
        return "int8" if "quantized_from" in self.manifest else "float32"

    @property
    def named(self) -> dict[str, str]:
        """Its folder and the SHA-256 of its manifest, by which records tell it from others."""
        digest = sha256_of(self.folder / "manifest.json")
        return {"folder": str(self.folder), "manifest_sha256": digest}

    @classmethod
    def load(cls, folder: Path, lazy: bool = False) -> "Bundle":
        """The bundle in `folder`, on the CPU, in evaluation mode.

        Args:
            folder: where it lies.
            lazy: keep one expert in memory and the next one coming, instead of all; the results
                are the same. A file that changes is verified again before it is used again.

        Raises:
            ValueError: damaged, incomplete, or holding pickles; the sentence names the file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        several = len({entry["file"] for entry in manifest["experts"]}) > 1
        experts = (_lazy_experts if lazy and several else _resident_experts)(folder, manifest)
        partition = Partition(manifest["partition"])
        denoiser = RoutedExperts(experts, partition) if several else experts[0]
        return cls(denoiser.eval().requires_grad_(False), manifest, folder)

    @classmethod
    def stitch(
        cls,
        sources: Sequence[Path],
        output: Path,
        partition: Partition | None = None,
        allow_unfinished: bool = False,
        seed: int | None = None,
    ) -> "Bundle":
        """Writes and loads the bundle of these experts.

        Args:
            sources: one an interval in any order, each as `Expert.read` takes it; one that covers
                more than an interval (a baseline) serves every interval nobody else serves.
            output: the bundle's folder; replaced when it holds a bundle.
            partition: whose intervals are to be served; by default that of the sources.
            allow_unfinished: take experts that were not trained to their end; recorded.
            seed: which network to take of runs that trained several seeds side by side.

        Raises:
            ValueError: the experts do not fit together, or leave or share an interval.
        """
        experts = [Expert.read(source, seed) for source in sources]
        if not experts:
            raise ValueError("no expert was given: name at least one training run")
        check_together(experts, allow_unfinished)
        return cls.write(experts, output, partition)

    @classmethod
    def write(
        cls, experts: Sequence[Expert], output: Path, partition: Partition | None = None
    ) -> "Bundle":
        """As `stitch`, of experts that have been read and fit together."""
        output = Path(output)
        check_output(output, experts)
        for expert in experts:
            check_weights(expert.path, expert.weights)
        if partition is None:
            # The finest: a baseline beside experts has the whole chain as its own.
            partition = Partition(max((e.identity["partition"] for e in experts), key=len))
            if all(e.interval == Interval() for e in experts):
                partition = Partition([0, 1])
        owners = _owners(experts, partition)
        files = {id(e): f"{owners.index(e):02d}.safetensors" for e in owners}
        entries = []
        for expert, interval in zip(owners, partition.intervals()):
            file = output / files[id(expert)]
            if not any(entry["file"] == file.name for entry in entries):
                with replacing(file) as temporary:
                    save_file(expert.weights, temporary, {"identity": json.dumps(expert.identity)})
            entries.append(
                {
                    "interval": [interval.lo, interval.hi],
                    "file": file.name,
                    "sha256": sha256_of(file),
                    "step": expert.step,
                    "source": {"path": str(expert.path), "sha256": expert.sha256},
                    "identity": expert.identity,
                }
            )
        shared = {key: experts[0].identity[key] for key in SHARED}
        manifest = {
            "format": 1,
            "partition": list(partition.edges),
            "shared": shared,
            "experts": entries,
        }
        return cls._written(output, manifest)

    @classmethod
    def quantize(cls, source: Path, output: Path) -> "Bundle":
        """Writes and loads the bundle `source` with weights in int8, a quarter of its size.

        Args:
            source: the bundle's folder.
            output: the new bundle's folder; replaced when it holds a bundle.

        Raises:
            ValueError: the source is damaged, or rounded already, or there is no room for another.
        """
        source, output = Path(source), Path(output)
        manifest = read_manifest(source)
        if "quantized_from" in manifest:
            raise ValueError(
                f"{source} is rounded already: give {manifest['quantized_from']['path']}"
            )
        if output.resolve() == source.resolve():
            raise ValueError(f"{output} would take the place of its source: choose another folder")
        check_output(output)
        network = build(manifest["shared"]["network"], Network)
        digests: dict[str, str] = {}
        for entry in manifest["experts"]:
            if (file := entry["file"]) not in digests:
                weights = read_weights(source, entry)
                with replacing(output / file) as temporary:
                    about = {"identity": json.dumps(entry["identity"])}
                    save_file(quantized(network, weights), temporary, about)
                digests[file] = sha256_of(output / file)
        experts = [entry | {"sha256": digests[entry["file"]]} for entry in manifest["experts"]]
        origin = {"path": str(source), "manifest_sha256": sha256_of(source / "manifest.json")}
        return cls._written(output, manifest | {"experts": experts, "quantized_from": origin})

    @classmethod
    def _written(cls, folder: Path, manifest: dict[str, Any]) -> "Bundle":
        """The bundle of this manifest, whose files have been written."""
        write_json(folder / "manifest.json", manifest)
        files = [entry["file"] for entry in manifest["experts"]]
        for left in folder.glob("*.safetensors"):
            if left.name not in files:
                left.unlink()
        return cls.load(folder)


def classes_of(denoiser: Denoiser) -> int | None:
    """How many labels its networks know; ``None`` for an unconditional model."""
    return next(net.num_classes for net in denoiser.modules() if isinstance(net, Network))


def _resident_experts(folder: Path, manifest: dict[str, Any]) -> list[Denoiser]:
    """The expert of each interval; one and the same where their file is."""
    shared = manifest["shared"]
    experts: dict[str, Denoiser] = {}
    for entry in manifest["experts"]:
        if (file := entry["file"]) not in experts:
            weights = read_weights(folder, entry)
            network = network_of(shared["network"], weights, folder / file)
            experts[file] = denoiser_of(shared, network)
    return [experts[entry["file"]] for entry in manifest["experts"]]


def _lazy_experts(folder: Path, manifest: dict[str, Any]) -> list[Denoiser]:
    """The expert of each interval, all in one network; the noisiest is the first there."""
    shared = manifest["shared"]
    network = build(shared["network"], Network)
    entries = {entry["file"]: entry for entry in reversed(manifest["experts"])}
    verified: dict[str, tuple[int, int]] = {}

    def read(file: str, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        path = folder / file
        state = path.stat() if path.is_file() else None
        stamp = (state.st_ino, state.st_ctime_ns) if state else None
        if stamp and stamp == verified.get(file):  # verifying takes longer than reading
            return read_tensors(path, memory)
        memory.clear()
        weights = read_weights(folder, entries[file])
        check_fit(network, weights, path)
        verified[file] = stamp
        return weights

    files = [entry["file"] for entry in manifest["experts"]]
    slot = Slot(denoiser_of(shared, network), files, read)
    last = len(files) - 1
    for i in (*range(last, -1, -1), last):  # all are refused now, not after hours
        slot.take(i)
    experts: list[Denoiser] = []
    for i, file in enumerate(files):
        same = i > 0 and file == files[i - 1]
        experts.append(experts[-1] if same else LazyExpert(slot, i))
    return experts


def _owners(experts: Sequence[Expert], partition: Partition) -> list[Expert]:
    owners = []
    for i, interval in enumerate(partition.intervals()):
        able = [e for e in experts if e.interval.contains(interval)]
        exact = [e for e in able if e.interval == interval]
        chosen = exact or able
        if not chosen:
            raise ValueError(
                f"no expert was given for interval {i} {interval} of {partition}: train it with "
                f"`expertdiff fit --model.expert {i}`, or add a baseline to fill it"
            )
        if len(chosen) > 1:
            paths = " and ".join(str(e.path) for e in chosen)
            raise ValueError(f"{paths} both serve interval {i} {interval}: leave one out")
        owners.append(chosen[0])
    for expert in experts:
        if not any(expert is owner for owner in owners):
            raise ValueError(
                f"{expert.path} (interval {expert.interval}) serves no interval of {partition}: "
                "leave it out, or name another partition"
            )
    return owners


def check_output(folder: Path, sources: Sequence[Expert] = ()) -> None:
    """Raises a ValueError where a bundle would take the place of something else, or a source."""
    if folder.exists() and not (folder / "manifest.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a bundle: choose another folder")
    for source in sources:
        if source.path.resolve().parent == folder.resolve():
            raise ValueError(
                f"{folder} would take the place of its source {source.path.name}: choose another "
                "folder"
            )
