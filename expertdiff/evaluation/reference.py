"""Files of Inception statistics that others published: ADM's, EDM's, torch-fidelity's."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertdiff.evaluation.frechet import Statistics
from expertdiff.image_files import images_of, read_arrays

POOL, SPATIAL = 2048, 2023
"""Dimensions of pool_3, and of the spatial features of sFID."""

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
"""Names of statistics in a file."""


class ReferenceFile(NamedTuple):
    """What a file holds.

    Attributes:
        images: uint8 [N,C,H,W].
        pool: statistics of pool_3.
        spatial: statistics of the spatial features.
    """

    images: Tensor | None
    pool: Statistics | None
    spatial: Statistics | None


def read_reference(path: Path) -> ReferenceFile:
    """The images and statistics of a file; nothing in it is executed.

    Args:
        path: ADM's ``.npz`` (`arr_0` images, or `mu`, `sigma`, `mu_s`, `sigma_s`, or both), EDM's
            (`mu`, `sigma`), or torch-fidelity's cached ``.pt`` (the same two). Statistics come out
            in float64, whatever the file's own types are.

    Raises:
        ValueError: no file, unreadable, a pickle, none of these, or statistics that are no numbers,
            of other dimensions or not finite.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give an .npz or torch-fidelity's .pt")
    arrays = _unpickled(path) if path.suffix == ".pt" else read_arrays(path, (*MOMENTS, "arr_0"))
    images = images_of(path, arrays)[0] if "arr_0" in arrays else None
    pool = _statistics(path, arrays, "mu", "sigma", POOL)
    spatial = _statistics(path, arrays, "mu_s", "sigma_s", SPATIAL)
    if images is None and pool is None:
        raise ValueError(
            f"{path} holds neither images (arr_0) nor statistics (mu and sigma): give ADM's or "
            "EDM's .npz, or torch-fidelity's cached statistics (.pt)"
        )
    return ReferenceFile(images, pool, spatial)


def _statistics(
    path: Path, arrays: dict[str, Any], mu: str, sigma: str, dimensions: int
) -> Statistics | None:
    if mu not in arrays or sigma not in arrays:
        return None
    try:  # in a .pt they may be anything, tensors among it
        moments = [np.asarray(arrays[name], np.float64) for name in (mu, sigma)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds {mu} or {sigma} that is no array of numbers: give ADM's, EDM's or "
            "torch-fidelity's file as it was published"
        ) from error
    shapes = [moment.shape for moment in moments]
    if shapes != [(dimensions,), (dimensions, dimensions)]:
        raise ValueError(
            f"{path} holds {mu} {list(shapes[0])} and {sigma} {list(shapes[1])} where Inception's "
            f"have {dimensions} dimensions: give statistics of the same features"
        )
    try:
        return Statistics(*map(torch.from_numpy, moments), None)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {mu} or {sigma} is not finite; fetch it again"
        ) from error


def _unpickled(path: Path) -> dict[str, Any]:
    """The statistics in a file of torch-fidelity's, which torch.save wrote."""
    rebuild = np.zeros(0).__reduce__()[0]
    allowed = [
        np.ndarray,
        np.dtype,
        *(type(np.dtype(name)) for name in ("float32", "float64")),
        # Its name in files of numpy 2 and of numpy 1.
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's errors have nothing in common
        raise ValueError(
            f"{path} cannot be loaded as plain arrays ({type(error).__name__}): it is damaged, or "
            "a pickle, which is never run; give statistics as .npz"
        ) from error
    content = content if isinstance(content, dict) else {}
    return {name: content[name] for name in MOMENTS if name in content}
