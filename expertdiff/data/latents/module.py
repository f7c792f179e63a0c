"""The data module of latents."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from expertdiff.data.base import Batch, Data, Draw, Split
from expertdiff.data.latents.store import Store
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.seeds import generator

RESIDENT = 8 * 2**30
"""Bytes up to which latents are moved to the training device once."""


class Rows(NamedTuple):
    """A batch of latents that has been gathered.

    Attributes:
        moments: mean and standard deviation of each picture or its mirror image [B, 2, C, h, w].
        y: [B], int64.
        index: [B], int64.
        seeds: see `Draw`.
    """

    moments: Tensor
    y: Tensor
    index: Tensor
    seeds: tuple[int, ...]


class Latents(Data):
    """Latents that `expertdiff latents` made of images; x0 = (z - shift) * scale.

    z is drawn from the autoencoder's posterior anew whenever an item is: of each picture, or of its
    mirror image, the store has mean and standard deviation. In a validation the draw is always the
    same. Samples are decoded before they are judged, beside the pictures themselves, of which the
    store has kept the first 50,000 of each split.

    Args:
        root: the folder.
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: train on the mirror image with probability 1/2.
        resident: move all latents to the training device, and verify every byte; else they stay
            on disk, mapped into memory, and batches are gathered there. By default up to 8 GiB are
            moved.

    Raises:
        ValueError: later: no latents, unfinished or damaged ones, or some that do not say their
            scale.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = True,
        resident: bool | None = None,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference)
        self.root, self.flip, self.resident = Path(root).expanduser(), flip, resident

    @cached_property
    def _store(self) -> Store:
        return Store.open(self.root)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._store.facts["shape"])

    @property
    def num_classes(self) -> int | None:
        return self._store.facts["num_classes"]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self._store.facts["class_names"]
        return names and tuple(names)

    @property
    def _digest(self) -> str:
        return self._store.facts["digest"]

    @cached_property
    def _on_device(self) -> bool:
        return self._store.nbytes("") <= RESIDENT if self.resident is None else self.resident

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        """Moments [N, 2, 2, C, h, w], mapped into memory, and labels; see `Store`."""
        moments = self._store.moments(name, verified=self._on_device)
        return torch.from_numpy(moments), torch.from_numpy(self._store.labels(name))

    def real(self, name: Literal["train", "validation", "reference"]) -> Tensor:
        """The first pictures of a split, uint8 [n, 3, H, W], mapped into memory."""
        name = self.reference if name == "reference" else name
        return torch.from_numpy(self._store.images(name))

    def scaled(self, items: Tensor) -> Tensor:
        """x0 of the posterior's mean, of pictures that are not mirrored."""
        return self._x0(items[:, 0, 0].float())

    def identity(self) -> dict[str, Any]:
        """See `Data`; ``autoencoder`` is what decodes samples."""
        facts = self._store.facts
        own = {"scale": facts["scale"], "flip": self.flip, "autoencoder": facts["autoencoder"]}
        return super().identity() | own

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The `Rows` of a `Draw`, gathered on the CPU unless the latents lie on the device."""
        if not isinstance(batch, Draw) or self._on_device:
            return batch
        rows = self._rows(batch, *self.split(self._now))
        if self.trainer.strategy.root_device.type != "cuda":
            return rows
        return rows._replace(moments=rows.moments.pin_memory())  # copied while the GPU computes

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The `Batch` of a `Draw` or of `Rows`; any other batch as it is."""
        if isinstance(batch, Draw):
            batch = self._rows(batch, *self._on(batch.index.device, self._now))
        if not isinstance(batch, Rows):
            return batch
        mean, std = batch.moments.float().unbind(1)
        return Batch(self._x0(mean + std * self._noise(batch)), batch.y, batch.index)

    def _rows(self, draw: Draw, moments: Tensor, labels: Tensor) -> Rows:
        chosen = moments[draw.index, draw.flip.long()]
        return Rows(chosen, labels[draw.index], draw.index, draw.seeds)

    def _noise(self, rows: Rows) -> Tensor:
        """Standard normal [B, C, h, w]; where nothing is trained, always the same of an item."""
        device = rows.moments.device
        if not rows.seeds:
            # Its step 0 is the noise that a validation adds to x0.
            return SampleNoise(0, rows.index.tolist(), self.shape, device)(1)
        n = len(rows.index) // len(rows.seeds)
        draws = (generator(device, seed, "posterior") for seed in rows.seeds)
        return torch.cat([torch.randn(n, *self.shape, generator=g, device=device) for g in draws])

    def _x0(self, z: Tensor) -> Tensor:
        scale = self._store.facts["scale"]
        return (z - scale["shift"]) * scale["factor"]
