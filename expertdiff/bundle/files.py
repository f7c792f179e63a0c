"""The files of a bundle: a manifest, and one of weights an expert; none holds a pickle."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertdiff import checkpoints
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.files import read_json, sha256_of
from expertdiff.int8 import SCALE

PICKLES = {".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".bin"}

AT_ONCE = 2**23
"""Bytes that are read of a file until what lies in memory of it is let go."""

SHARED = ("process", "prediction", "network", "data")
"""What the experts of one bundle must have in common."""


def check_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Raises a ValueError that names `path` unless its weights are finite, and float32."""
    for key, value in weights.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{path}: {key} is {value.dtype}, not torch.float32")
        if not checkpoints.finite(value):
            raise ValueError(
                f"{path}: {key} holds NaN or infinity: go back to an earlier checkpoint"
            )


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


def read_weights(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """The verified weights of one of the manifest's experts, in float32."""
    path = folder / entry["file"]
    if path.parent != folder or path.suffix != ".safetensors":
        raise ValueError(f"{path} is no safetensors file of this bundle")
    if not path.is_file():
        raise ValueError(f"{path} is missing: stitch the bundle again")
    if sha256_of(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; stitch it again")
    try:
        weights = read_tensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: stitch the bundle again") from error
    check_weights(path, weights)
    return weights


def read_tensors(path: Path, memory: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a file in float32; copies, which no later change of the file reaches.

    They take the places of the tensors in `memory`, if any, which leave it: of the same names and
    shapes. Memory that is used again costs no page faults.
    """
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    scales = {name + SCALE for name in names}.intersection(names)
    weights: dict[str, Tensor] = {}
    while names:
        # Opened anew, or in the end the whole file would be in memory beside the copies.
        with safe_open(path, "pt") as file:
            read = 0
            while names and read < AT_ONCE:
                if (name := names.pop()) in scales:
                    continue
                value = file.get_tensor(name)
                scale = file.get_tensor(name + SCALE) if name + SCALE in scales else None
                dtype = value.dtype if scale is None else scale.dtype
                weight = memory.pop(name) if memory else torch.empty(value.shape, dtype=dtype)
                weight.copy_(value)
                weights[name] = weight if scale is None else weight.mul_(scale)
                read += weight.nbytes
    return weights
