"""Points on the plane."""

from typing import Any

import torch
from torch import Tensor

from expertdiff.data.base import Data, Split
from expertdiff.data.densities import Density


class Toy2D(Data):
    """Points of a distribution on the plane, float32 [N, 2]; x0 is the point itself.

    Args:
        density: what the points are drawn from.
        batch_size: see `Data`.
        samples: how many points each split has; a density that is a file may have fewer.
        validation_samples: see `Data`.
        reference: see `Data`.

    Raises:
        ValueError: fewer than 100 samples. Later: a file of the density is missing or damaged.
    """

    shape = (2,)

    def __init__(
        self,
        density: Density,
        batch_size: int = 256,
        samples: int = 100_000,
        validation_samples: int = 10_000,
        reference: Split = "validation",
    ) -> None:
        super().__init__(batch_size, validation_samples, reference)
        if samples < 100:
            raise ValueError(f"{samples} samples are too few points: give at least 100")
        self.density, self.samples = density, samples

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        points = torch.from_numpy(self.density.points(name, self.samples)).float()
        return points, torch.zeros(len(points), dtype=torch.int64)

    def scaled(self, items: Tensor) -> Tensor:
        return items

    def identity(self) -> dict[str, Any]:
        """See `Data`; drawn points x stand for ``centre + unit * x`` in the user's coordinates."""
        scale = {"centre": list(self.density.centre), "unit": self.density.unit}
        return super().identity() | {"scale": scale}
