"""Trained weights that can serve an interval, wherever they lie."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff import checkpoints
from expertdiff.bundle.files import SHARED, check_weights, read_manifest, read_weights
from expertdiff.describe import build, differences
from expertdiff.diffusion.denoiser import NetworkDenoiser, PredictionType
from expertdiff.diffusion.partition import Interval
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.files import sha256_of
from expertdiff.networks.flow import of_flow
from expertdiff.networks.network import Network

PREFIX = "denoiser.network."


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
        network = network_of(self.identity["network"], self.weights, self.path)
        return denoiser_of(self.identity, network).eval().requires_grad_(False)

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
        check_weights(path, weights)
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
                weights = read_weights(path.parent, entry)
                return cls(path, entry["identity"], entry["step"], entry["sha256"], weights)
        raise ValueError(f"{path.parent} does not name {path.name} in its manifest")


def denoiser_of(identity: dict[str, Any], network: Network) -> NetworkDenoiser:
    """A network as the denoiser that an identity, or the shared part of a manifest, tells of."""
    process = build(identity["process"], NoiseProcess)
    return NetworkDenoiser(network, process, build(identity["prediction"], PredictionType))


def network_of(description: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Network:
    """A network with the weights that were read from `path`."""
    network = build(description, Network)
    check_fit(network, weights, path)
    network.load_state_dict(weights)
    return network


def check_fit(network: Network, weights: dict[str, Tensor], path: Path) -> None:
    """Raises a ValueError that names `path` unless its weights are those of such a network."""
    try:
        network.check(weights)
    except ValueError as error:
        raise ValueError(f"{path} does not fit its network: {error}") from error


def check_data(path: Path, trained: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raises a ValueError unless `data` are of the kind that the model in `path` was trained on.

    Args:
        path: of the model.
        trained, data: of its training, and those that it is to meet (`Data.identity`).
    """
    for key in ("shape", "scale"):
        if data[key] != trained[key]:
            raise ValueError(
                f"{path} was trained on data of {key} {trained[key]}, these have {data[key]}: name "
                "the data it was trained on"
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
