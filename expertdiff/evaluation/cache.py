"""What was computed of real images, kept on disk: it is the same in every test."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expertdiff.files import replacing

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertdiff"
"""The folder."""

Values = dict[str, Tensor | float]


def cached(
    folder: Path,
    compute: Callable[[], Values],
    *,
    data_digest: str,
    count: int,
    resolution: int,
    extractor: str,
) -> Values:
    """The values of a real set, from `folder` if they were computed for the very same thing.

    The file's name is the SHA-256 of all that the numbers depend on, so other images, weights or
    sizes never meet an old file; one that is truncated or renamed is computed again. Any number of
    processes may call this at once: files appear whole.
    A folder that cannot be written is warned of.

    Args:
        folder: created if need be.
        compute: called when there is no such file; tensors, and numbers, by name.
        data_digest: identifies the images' bytes and their order.
        count: how many images.
        resolution: their side in pixels, as the extractor gets them.
        extractor: `FeatureExtractor.identity`.
    """
    key = json.dumps([data_digest, count, resolution, extractor])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    values = _read(path, key)
    if values is None:
        values = compute()
        arrays = {n: v.cpu().numpy() if isinstance(v, Tensor) else v for n, v in values.items()}
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, key=key, **arrays)
        except OSError as error:
            warnings.warn(
                f"cannot keep what was computed of {count} images in {folder} ({error.strerror}), "
                "so it will be computed again: set XDG_CACHE_HOME to a folder with room",
                stacklevel=2,
            )
    return values


def digest_of(items: Tensor) -> str:
    """The SHA-256, in hex, of the bytes of items on the CPU."""
    return hashlib.sha256(items.contiguous().numpy()).hexdigest()


def _read(path: Path, key: str) -> Values | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["key"] != key:
                return None
            arrays = {name: file[name] for name in file if name != "key"}
        return {n: torch.from_numpy(a) if a.ndim else a.item() for n, a in arrays.items()}
    except Exception:  # absent or broken in whatever way: it can be computed again
        return None
