"""Real items beside those that a model has drawn, for a classifier that tells them apart."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertdiff.data.base import Data, Split, permutation
from expertdiff.data.densities import read_points
from expertdiff.image_files import load_npz


class RealAndGenerated(Data):
    """Training items of a data set (label 1) beside as many that a model has drawn (label 0).

    A tenth of each is held out; of the smaller set, items then come several times.

    Args:
        real_data: the data set; of its training split, as its other one is what models are judged
            by.
        generated: what ``expertdiff sample`` wrote: ``samples.npz`` or ``samples.csv``.
        batch_size: see `Data`.
        validation_samples: see `Data`; of the held-out items.
        shuffled: the control: labels say nothing about the items.

    Raises:
        ValueError: latents, whose samples are no files of latents. Later: a file that cannot be
            read, or of items of another shape, or too few to hold any out.
    """

    def __init__(
        self,
        real_data: Data,
        generated: Path,
        batch_size: int = 128,
        validation_samples: int = 10_000,
        shuffled: bool = False,
    ) -> None:
        super().__init__(batch_size, validation_samples)
        self.real_data, self.generated, self.shuffled = real_data, generated, shuffled
        self.shape, self.flip = real_data.shape, real_data.flip

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        sets = [self.real_data.split("train")[0], self._drawn()]
        if self.shuffled:
            pool = torch.cat(sets)
            pool = pool[torch.from_numpy(permutation(len(pool), "shuffled"))]
            sets = list(pool.split([len(items) for items in sets]))
        if min(map(len, sets)) < 10:
            raise ValueError(
                f"{self.generated} or the real data have fewer than 10 items, of which no tenth "
                "can be held out: give more"
            )
        sets = [_side(items, name) for items in sets]
        n = max(map(len, sets))
        even = [items[torch.arange(n) % len(items)] for items in sets]
        return torch.stack(even, dim=1).flatten(0, 1), torch.tensor([1, 0]).repeat(n)

    def _drawn(self) -> Tensor:
        """The generated items, as the data set holds real ones."""
        data = self.real_data.identity()
        if "autoencoder" in data:
            raise ValueError(
                "samples of a latent model are kept as images, so a discriminator of latents "
                "cannot be trained: name data of images or points"
            )
        if len(self.shape) == 1:
            scale, points = data["scale"], torch.from_numpy(read_points(Path(self.generated)))
            centre = torch.tensor(scale["centre"], dtype=points.dtype)
            items = ((points - centre) / scale["unit"]).float()
        else:
            items = load_npz(Path(self.generated))[0]
        if tuple(items.shape[1:]) != self.shape:
            raise ValueError(
                f"{self.generated} holds items of shape {tuple(items.shape[1:])}, the real ones "
                f"have {self.shape}: name samples of a model of these data"
            )
        return items

    def scaled(self, items: Tensor) -> Tensor:
        return self.real_data.scaled(items)

    def augmented(self, items: Tensor, flip: Tensor) -> Tensor:
        return self.real_data.augmented(items, flip)

    def identity(self) -> dict[str, Any]:
        """See `Data`; with the scale of the real data, and what those are."""
        real = self.real_data.identity()
        return super().identity() | {"scale": real["scale"], "real": real}


def _side(items: Tensor, name: Split) -> Tensor:
    """Items of one side of the tenth that is held out."""
    order, apart = torch.from_numpy(permutation(len(items), "held out")), len(items) // 10
    return items[order[:apart] if name == "validation" else order[apart:]]
