"""Images or points: how drawn samples are drawn, finished, kept and shown."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.diffusion.samplers import DDIM, DDPM, Sampler
from expertdiff.evaluation.images import save_grid, save_npz, to_uint8
from expertdiff.evaluation.points import save_points, save_scatter


class Kind(ABC):
    """What samples of one kind need.

    Attributes:
        shown: how many a picture shows, and are drawn where nothing else is said.
    """

    shown: int

    @abstractmethod
    def sampler(self) -> Sampler:
        """How they are drawn where nothing else is said."""

    @abstractmethod
    def finished(self, x: Tensor) -> Tensor:
        """What a sampler made, as the data set holds its items.

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

    def sampler(self) -> Sampler:
        return DDIM()

    def finished(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def picture(self, samples: Tensor, path: Path) -> None:
        save_grid(samples, path, columns=round(len(samples) ** 0.5))

    def save(self, samples: Tensor, labels: Tensor | None, folder: Path, scale: Any) -> Path:
        path = folder / "samples.npz"
        save_npz(samples, path, labels)
        return path


class PointKind(Kind):
    """Points: as they are, a scatter plot, a ``.csv`` in the user's coordinates."""

    shown = 10_000

    def sampler(self) -> Sampler:
        return DDPM(clip=False)

    def finished(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("points hold NaN or infinity: the sampler or its network diverged")
        return x

    def picture(self, samples: Tensor, path: Path) -> None:
        save_scatter(samples, path)

    def save(self, samples: Tensor, labels: Tensor | None, folder: Path, scale: Any) -> Path:
        path = folder / "samples.csv"
        save_points(torch.tensor(scale["centre"]) + scale["unit"] * samples, path)
        return path


def kind(shape: Sequence[int]) -> Kind:
    """The kind of samples of this shape: images (C, H, W), or points (D,)."""
    return PointKind() if len(shape) == 1 else ImageKind()
