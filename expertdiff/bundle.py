"""Finished experts on disk as one model: stitched from training runs, verified, pickle-free.

A bundle is a folder: ``manifest.json`` (what it is), ``config.yaml`` (how to test it) and one
``NN.safetensors`` an expert. Loading it needs torch and safetensors, not lightning.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertdiff import checkpoints
from expertdiff.describe import build, differences
from expertdiff.diffusion.denoiser import Denoiser, NetworkDenoiser, PredictionType
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.experts.lazy import LazyExpert, Slot
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import read_json, replacing, sha256_of, write_json
from expertdiff.int8 import SCALE, quantized
from expertdiff.networks.flow import of_flow
from expertdiff.networks.network import Network

PREFIX = "denoiser.network."
PICKLES = {".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".bin"}
SHARED = ("process", "prediction", "network", "data")
"""What the experts of one bundle must have in common."""


@dataclass
class Expert:
    """Trained weights that can serve an interval, and what they are.

    Attributes:
        path: the checkpoint or bundle file they come from.
        identity: see `Method.identity`.
        step: optimizer steps of training.
        sha256: of that file.
        weights: the averaged weights of the network.
    """

    path: Path
    identity: dict[str, Any]
    step: int
    sha256: str
    weights: dict[str, Tensor]

    @property
    def interval(self) -> Interval:
        """The part of the chain it was trained on."""
        return Interval(*self.identity["interval"])

    def denoiser(self) -> NetworkDenoiser:
        """It alone, on the CPU, in evaluation mode."""
        network = _network(self.identity["network"], self.weights, self.path)
        return _denoiser(self.identity, network).eval().requires_grad_(False)

    @classmethod
    def read(cls, source: Path, seed: int | None = None) -> "Expert":
        """From a training run's folder (its newest checkpoint), a checkpoint, or a bundle's file.

        Of a run that keeps its best weights it takes those.

        Args:
            source: the folder or file.
            seed: which network to take of a run that trained several seeds side by side.

        Raises:
            ValueError: there is nothing to read, or it is damaged, or not finite.
        """
        source = Path(source)
        if source.suffix == ".safetensors":
            return cls._from_bundle(source)
        path, trained = source, None
        if source.is_dir():
            path = checkpoints.newest(source / "checkpoints")
            if path is None:
                raise ValueError(f"{source} holds no checkpoint: train it with `expertdiff fit`")
            trained = checkpoints.step_of(path)
            if (source / checkpoints.BEST).is_file():
                path = source / checkpoints.BEST
        content = checkpoints.load(path)
        identity = content.get(checkpoints.IDENTITY)
        if identity is None:
            raise ValueError(f"checkpoint {path} was not written by expertdiff")
        weights = {
            key.removeprefix(PREFIX): value.contiguous()  # trained as channels_last on a GPU
            for key, value in content[checkpoints.AVERAGED].items()
            if key.startswith(PREFIX)
        }
        if identity.get("stacked"):
            if seed not in identity["seeds"]:
                raise ValueError(
                    f"{path} holds the seeds {identity['seeds']} side by side, not {seed}: "
                    "name one of them"
                )
            member = identity["seeds"].index(seed)
            weights = {key: value[member].clone() for key, value in weights.items()}
            identity = identity | {"seeds": [seed], "stacked": False}
        _check_weights(path, weights)
        step = content["global_step"] if trained is None else trained
        return cls(path, identity, step, checkpoints.digest(path), weights)

    @classmethod
    def start(cls, source: Path) -> "Expert":
        """What a training may start from: as `read`, or the ``.pt`` of another project."""
        source = Path(source)
        if source.suffix not in (".pt", ".pth"):
            return cls.read(source)
        weights = checkpoints.read_published(source)
        return cls(source, {}, 0, sha256_of(source), weights)

    @classmethod
    def _from_bundle(cls, path: Path) -> "Expert":
        manifest = read_manifest(path.parent)
        if "quantized_from" in manifest:
            raise ValueError(
                f"{path} holds rounded weights, from which nothing is made: take the file of "
                f"{manifest['quantized_from']['path']}"
            )
        for entry in manifest["experts"]:
            if entry["file"] == path.name:
                weights = _read_weights(path.parent, entry)
                return cls(path, entry["identity"], entry["step"], entry["sha256"], weights)
        raise ValueError(f"{path.parent} does not name {path.name} in its manifest")


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
        output = Path(output)
        _check_output(output)
        experts = [Expert.read(source, seed) for source in sources]
        if not experts:
            raise ValueError("no expert was given: name at least one training run")
        check_together(experts, allow_unfinished)
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
        _check_output(output)
        network = build(manifest["shared"]["network"], Network)
        digests: dict[str, str] = {}
        for entry in manifest["experts"]:
            if (file := entry["file"]) not in digests:
                weights = _read_weights(source, entry)
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


def _denoiser(identity: dict[str, Any], network: Network) -> NetworkDenoiser:
    process = build(identity["process"], NoiseProcess)
    return NetworkDenoiser(network, process, build(identity["prediction"], PredictionType))


def _network(description: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Network:
    network = build(description, Network)
    _check_fit(network, weights, path)
    network.load_state_dict(weights)
    return network


def _check_fit(network: Network, weights: dict[str, Tensor], path: Path) -> None:
    try:
        network.check(weights)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its network: {error}") from error


def _resident_experts(folder: Path, manifest: dict[str, Any]) -> list[Denoiser]:
    """The expert of each interval; one and the same where their file is."""
    shared = manifest["shared"]
    experts: dict[str, Denoiser] = {}
    for entry in manifest["experts"]:
        if (file := entry["file"]) not in experts:
            weights = _read_weights(folder, entry)
            network = _network(shared["network"], weights, folder / file)
            experts[file] = _denoiser(shared, network)
    return [experts[entry["file"]] for entry in manifest["experts"]]


def _lazy_experts(folder: Path, manifest: dict[str, Any]) -> list[Denoiser]:
    """The expert of each interval, all in one network; the noisiest is the first there."""
    shared = manifest["shared"]
    network = build(shared["network"], Network)
    entries = {entry["file"]: entry for entry in reversed(manifest["experts"])}
    verified: dict[str, tuple[int, int]] = {}

    def read(file: str) -> dict[str, Tensor]:
        path = folder / file
        state = path.stat() if path.is_file() else None
        stamp = (state.st_ino, state.st_ctime_ns) if state else None
        if stamp and stamp == verified.get(file):  # verifying takes longer than reading
            return _tensors(path)
        weights = _read_weights(folder, entries[file])
        _check_fit(network, weights, path)
        verified[file] = stamp
        return weights

    for file in reversed(entries):  # all are refused now, not after hours
        network.load_state_dict(read(file))  # at once, so that never two wait beside it
    files = [entry["file"] for entry in manifest["experts"]]
    slot = Slot(_denoiser(shared, network), files, read)
    experts: list[Denoiser] = []
    for i, file in enumerate(files):
        same = i > 0 and file == files[i - 1]
        experts.append(experts[-1] if same else LazyExpert(slot, i))
    return experts


def _check_weights(path: Path, weights: dict[str, Tensor]) -> None:
    for key, value in weights.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{path}: {key} is {value.dtype}, not torch.float32")
        if not checkpoints.finite(value):
            raise ValueError(
                f"{path}: {key} holds NaN or infinity: go back to an earlier checkpoint"
            )


def check_together(experts: Sequence[Expert], allow_unfinished: bool = False) -> None:
    """Raises a ValueError unless these experts can be parts of one model."""
    first = experts[0]
    for expert in experts:
        for key in SHARED:
            if changed := differences(first.identity[key], expert.identity[key], key):
                raise ValueError(
                    f"{first.path} and {expert.path} do not fit together: {'; '.join(changed)}"
                )
        ours, theirs = of_flow(first.weights), of_flow(expert.weights)
        if not all(torch.equal(ours[key], theirs[key]) for key in ours):
            raise ValueError(
                f"{first.path} and {expert.path} lie behind different flows: start both from the "
                "same run of INDM (model.init_from)"
            )
        if ("ema" in expert.identity) != ("ema" in first.identity):
            averaged, raw = sorted((first, expert), key=lambda e: "ema" not in e.identity)
            raise ValueError(
                f"{averaged.path} holds averaged weights, {raw.path} raw ones: take experts that "
                "were both trained by `expertdiff fit`"
            )
        for key in ("ema", "versions"):  # worth knowing, but they work together
            changed = differences(first.identity.get(key), expert.identity.get(key), key)
            if changed:
                warnings.warn(
                    f"{first.path} and {expert.path} differ: {'; '.join(changed)}", stacklevel=3
                )
        steps = expert.identity["max_steps"]
        if expert.step < steps and not allow_unfinished:
            raise ValueError(
                f"{expert.path} is not trained to its end (step {expert.step} of {steps}): "
                "resume its training, or allow unfinished experts"
            )


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


def _check_output(folder: Path) -> None:
    if folder.exists() and not (folder / "manifest.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a bundle: choose another folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the bundle in `folder` is; raises a ValueError where this is not known for sure."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is not a bundle: it has no manifest.json; make one with stitch")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise ValueError(f"{path} may hold a pickle: a bundle has safetensors files only")
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise ValueError(f"{folder} has a manifest of another format: stitch it again")
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/manifest.json is damaged ({error}): stitch it again") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    intervals = Partition(manifest["partition"]).intervals()
    if [Interval(*entry["interval"]) for entry in manifest["experts"]] != intervals:
        raise ValueError("its experts are not those of its partition")
    for entry, interval in zip(manifest["experts"], intervals):
        if not Interval(*entry["identity"]["interval"]).contains(interval):
            raise ValueError(f"{entry['file']} was not trained on {interval}")
        if not isinstance(entry["sha256"], str) or not isinstance(entry["step"], int):
            raise ValueError(f"{entry['file']} has no digest or step")
    for key in SHARED:
        manifest["shared"][key]


def _read_weights(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / entry["file"]
    if path.parent != folder or path.suffix != ".safetensors":
        raise ValueError(f"{path} is no safetensors file of this bundle")
    if not path.is_file():
        raise ValueError(f"{path} is missing: stitch the bundle again")
    if sha256_of(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; stitch it again")
    try:
        weights = _tensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: stitch the bundle again") from error
    _check_weights(path, weights)
    return weights


def _tensors(path: Path) -> dict[str, Tensor]:
    """The weights of a file in float32; copies, which no later change of the file reaches."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    scales = {name + SCALE for name in names}.intersection(names)
    weights = {}
    for first in range(0, len(names), 32):
        # Opened anew, or in the end the whole file would be in memory beside the copies.
        with safe_open(path, "pt") as file:
            for name in names[first : first + 32]:
                if name + SCALE in scales:
                    weights[name] = file.get_tensor(name) * file.get_tensor(name + SCALE)
                elif name not in scales:
                    weights[name] = file.get_tensor(name).clone()
    return weights
