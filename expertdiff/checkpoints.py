"""Training checkpoints on disk: atomic, verified, found by step, read without pickle.

Beside each ``step-00001000.ckpt`` lies ``step-00001000.ckpt.json`` with its step, size and SHA-256,
written last: a checkpoint without it, or that differs from it, does not count.
"""

import argparse
import re
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.describe import differences
from expertdiff.files import WriteFailed, read_json, replacing, sha256_of, write_json

IDENTITY = "expertdiff"
"""The key of a checkpoint under which `methods` writes what the weights are."""

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
"""What DistributedDataParallel and torch.compile put before the keys of a network."""

AVERAGED, RAW = "state_dict", "current_model_state"
"""Keys of the two sets of weights in a checkpoint; Lightning loads the first."""


BEST = "best.ckpt"
"""The file in the folder of a run that keeps its best weights beside its newest ones."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint of `step`."""
    return folder / f"step-{step:08d}.ckpt"


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint, reads it back, and only then lets it count.

    Raises:
        WriteFailed: it could not be written; older checkpoints are untouched.
    """
    try:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            _check_zip(temporary)
            record = {"size": temporary.stat().st_size, "sha256": sha256_of(temporary)}
        write_json(_record_path(path), {"step": checkpoint.get("global_step"), **record})
    except (RuntimeError, zipfile.BadZipFile) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        raise WriteFailed(path, error) from error


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in `path`, on the CPU.

    Raises:
        ValueError: missing, truncated or altered; the sentence says which.
    """
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path} holds more than tensors and plain values") from error


def read_published(path: Path) -> dict[str, Tensor]:
    """The weights in the ``.pt`` of another project, such as ADM's and DiT's, on the CPU.

    Of a training checkpoint (model, ema, ..) the averaged ones, else the raw ones; a file that has
    neither is itself the weights.

    Raises:
        ValueError: the file is missing or unreadable, or holds anything else.
    """
    try:
        # DiT's training checkpoints keep their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot read {path} ({reason}): give a .pt of nothing but weights"
        ) from error
    if isinstance(content, dict):
        content = content.get("ema", content.get("model", content))
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no weights: give a .pt of nothing but weights")
    for key, value in content.items():
        if not value.is_floating_point() or not finite(value):
            kind = "NaN or infinity" if value.is_floating_point() else f"{value.dtype} numbers"
            raise ValueError(f"{path}: {key} holds {kind}: give a file of finite weights")
    if coarse := {str(value.dtype) for value in content.values()} - {"torch.float32"}:
        warnings.warn(f"{path} holds {', '.join(sorted(coarse))}: taken as float32", stacklevel=2)
    return {WRAPPERS.sub("", key): value.float() for key, value in content.items()}


def finite(value: Tensor) -> bool:
    """Whether all numbers are; five times as fast as ``isfinite().all()``, and without a copy."""
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())


def verify(path: Path) -> None:
    """Raises a ValueError unless the bytes of `path` are those that were written."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if not _record_path(path).is_file():
        raise ValueError(f"checkpoint {path} is unfinished: {_record_path(path).name} is missing")
    record, size = read_json(_record_path(path)), path.stat().st_size
    if size != record["size"]:
        raise ValueError(f"checkpoint {path} has {size} bytes instead of {record['size']}")
    if digest(path) != record["sha256"]:
        raise ValueError(f"checkpoint {path} is damaged: its SHA-256 differs from the one written")


def digest(path: Path) -> str:
    """The SHA-256 of a checkpoint; computed once a process while nobody writes the file."""
    return _digest(path, path.stat().st_size, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


def newest(folder: Path) -> Path | None:
    """The valid checkpoint with the highest step, ``None`` where none was ever finished.

    Raises:
        ValueError: there are checkpoints, but none is valid.
    """
    paths = sorted(folder.glob("step-*.ckpt"), key=step_of, reverse=True)
    for path in paths:
        try:
            verify(path)
            if (step := read_json(_record_path(path))["step"]) != step_of(path):
                raise ValueError(f"checkpoint {path} is of step {step}, against its name")
            return path
        except ValueError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    # Without a record: of a job that was killed in its very first save.
    if finished := [path for path in paths if _record_path(path).is_file()]:
        raise ValueError(
            f"none of the {len(finished)} checkpoints in {folder} is valid: remove them"
        )
    return None


def same_run(ours: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Raises a ValueError that names what differs, unless the checkpoint's identity has `ours`."""
    theirs = {key: checkpoint.get(IDENTITY, {}).get(key) for key in ours}
    if changed := differences(ours, theirs):
        raise ValueError(
            f"these settings differ from those of the checkpoint to resume: {'; '.join(changed)}; "
            "restore them, or give the study another name"
        )


def remove(path: Path) -> None:
    """Removes a checkpoint; its record first, so that it never counts half."""
    _record_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
    return int(match[1]) if match else -1


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"{broken} did not survive writing")
