"""Images, latents of images, or points: how samples are drawn, finished, kept and shown."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.describe import Described, build
from expertdiff.diffusion.samplers import DDIM, DDPM, Sampler
from expertdiff.evaluation.points import save_points, save_scatter
from expertdiff.image_files import save_grid, save_npz, to_uint8


class Kind(ABC):
    """What samples of one kind need.

    Attributes:
        shown: how many a picture shows, and are drawn where nothing else is said.
        bounded: whether x0 is in [-1, 1], to which a sampler may clip it.
    """

    shown: int
    bounded: bool

    @abstractmethod
    def sampler(self) -> Sampler:
        """How they are drawn where nothing else is said."""

    @abstractmethod
    def finished(self, x: Tensor) -> Tensor:
        """What a sampler made, as the data set gives real items to a judge.

        Raises:
            ValueError: a value is not finite.
        """

    @abstractmethod
    def picture(self, samples: Tensor, path: Path) -> None:
        """A PNG of finished samples."""

    @abstractmethod
    def save(self, samples: Tensor, labels: Tensor | None, folder: Path, scale: Any) -> Path:
        """Finished samples as a file in `folder`; `scale` is that of the data (`Data.identity`)."""


class ImageKind(Kind):
    """Images: uint8, a grid, an ``.npz`` in ADM's layout."""

    shown = 64
    bounded = True

    def sampler(self) -> Sampler:
        return DDIM(clip=self.bounded)

    def finished(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def picture(self, samples: Tensor, path: Path) -> None:
        save_grid(samples, path, columns=round(len(samples) ** 0.5))

    def save(self, samples: Tensor, labels: Tensor | None, folder: Path, scale: Any) -> Path:
        path = folder / "samples.npz"
        save_npz(samples, path, labels)
        return path


class LatentKind(ImageKind):
    """Latents: decoded, then as images.

    Args:
        data: see `kind`.

    Raises:
        ValueError: their autoencoder is not there any more, or another one is.
    """

    bounded = False

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.autoencoder = _autoencoder(json.dumps(data["autoencoder"]))
        if self.autoencoder.identity != data["scale"]["autoencoder"]:
            raise ValueError(
                f"{data['autoencoder']['init_args']} is not the autoencoder of these latents, "
                f"whose SHA-256 begins with {data['scale']['autoencoder'][:12]}: put that one there"
            )

    def finished(self, x: Tensor) -> Tensor:
        return to_uint8(self.autoencoder.decode(x), rounded=True)


@lru_cache(maxsize=1)
def _autoencoder(description: str) -> Any:
    # By its name, as the room of the data, where autoencoders are, is beside this one.
    return build(json.loads(description), Described)


class PointKind(Kind):
    """Points: as they are, a scatter plot, a ``.csv`` in the user's coordinates."""

    shown = 10_000
    bounded = False

    def sampler(self) -> Sampler:
        return DDPM(clip=self.bounded)

    def finished(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("points hold NaN or infinity: the sampler or its network diverged")
        return x

    def picture(self, samples: Tensor, path: Path) -> None:
        save_scatter(samples, path)

    def save(self, samples: Tensor, labels: Tensor | None, folder: Path, scale: Any) -> Path:
        path = folder / "samples.csv"
        # In float64: far from the origin, float32 has no digits left for what lies between points.
        centre = torch.tensor(scale["centre"], dtype=torch.float64)
        save_points(centre + scale["unit"] * samples.double(), path)
        return path


def kind(data: Mapping[str, Any]) -> Kind:
    """The kind of samples of a model of these data (`Data.identity`).

    Latents have an ``autoencoder``; images are of shape (C, H, W), and points of shape (D,).
    """
    if "autoencoder" in data:
        return LatentKind(data)
    return PointKind() if len(data["shape"]) == 1 else ImageKind()
