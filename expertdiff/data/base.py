"""Data sets that live on the training device, and the order in which their items are drawn.

Small data need no loader workers: the items are moved once, and a batch is a list of indices that
is turned into tensors where the network is.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from expertdiff.describe import Described
from expertdiff.seeds import seed_of

Split = Literal["train", "validation"]


class Batch(NamedTuple):
    """What every step is given.

    Attributes:
        x0: the data [B, ...], float32.
        y: labels [B], int64; always there, the method decides whether to use them.
        index: position [B] of each item in its split, int64.
    """

    x0: Tensor
    y: Tensor
    index: Tensor


class Draw(NamedTuple):
    """A batch before it is gathered.

    Attributes:
        index: [B], int64.
        flip: [B], bool: mirror this item.
        seeds: of whatever else is drawn for the batch, one for each of its equal parts; none in a
            validation.
    """

    index: Tensor
    flip: Tensor
    seeds: tuple[int, ...] = ()


class Data(Described, LightningDataModule, ABC):
    """A small data set, kept in memory and on the training device.

    Args:
        batch_size: items a micro-batch, on each rank.
        validation_samples: how many items of the validation split a validation uses, from the
            first on; all of them where there are fewer.
        reference: the split that generated items are compared with.

    Attributes:
        shape: of one item.
        num_classes: labels are in [0, num_classes); ``None`` where there are none (all 0).
        class_names: of the labels, where they have names.
        flip: whether training mirrors half of the items; only images can be.

    Raises:
        ValueError: a number below 1.
    """

    shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    flip: bool = False

    def __init__(
        self, batch_size: int, validation_samples: int = 1000, reference: Split = "validation"
    ) -> None:
        super().__init__()
        if batch_size < 1 or validation_samples < 1:
            raise ValueError(
                f"batch_size {batch_size} and validation_samples {validation_samples} must be at "
                "least 1; to train without validation set trainer.limit_val_batches to 0"
            )
        self.batch_size, self.validation_samples = batch_size, validation_samples
        self.reference = reference
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        """Items [N, *shape] and labels [N] int64 of a split, on the CPU, always in one order."""

    @abstractmethod
    def scaled(self, items: Tensor) -> Tensor:
        """x0, float32, of `items` as `split` gives them."""

    def augmented(self, items: Tensor, flip: Tensor) -> Tensor:
        """`items` as training sees them."""
        return items

    def real(self, name: Literal["train", "validation", "reference"]) -> Tensor:
        """Items [N, ...] of a split as samples are when they are judged, on the CPU."""
        return self.split(name)[0]

    def fresh(self, n: int) -> Tensor:
        """The first `n` items of the split that is not the reference, as `real` gives them."""
        return self.real(other(self.reference))[:n]

    def split(self, name: Literal["train", "validation", "reference"]) -> tuple[Tensor, Tensor]:
        """Items [N, *shape] and labels [N] int64 of a split, on the CPU; read once.

        Raises:
            ValueError: no such split, or its files are missing or damaged.
        """
        name = self.reference if name == "reference" else name
        if name not in get_args(Split):
            raise ValueError(f"split {name!r} must be one of train, validation, reference")
        if name not in self._splits:
            self.prepare_data()  # where no trainer has
            self._splits[name] = self.read(name)
        return self._splits[name]

    def identity(self) -> dict[str, Any]:
        """What the training data are, as plain data: two runs on equal data have equal ones."""
        cls = type(self)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "shape": list(self.shape),
            "n": len(self.split("train")[0]),
            "digest": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.split("train"):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    # The loaders are plain iterables: nothing that Lightning would re-sample, shuffle or warn
    # about, and nothing that touches the global random state, as a DataLoader does.

    def train_dataloader(self) -> Iterable[Draw]:
        trainer = self.trainer
        return Stacked(
            Shuffled(
                n=len(self.split("train")[0]),
                batch_size=self.batch_size,
                seed=seed,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                flip=self.flip,
                start=lambda: trainer.global_step * trainer.accumulate_grad_batches,
            )
            for seed in trainer.lightning_module.seeds
        )

    def val_dataloader(self) -> Iterable[Draw]:
        n = min(self.validation_samples, len(self.split("validation")[0]))
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return Batches(in_order(n, self.batch_size, rank, world_size))

    def test_dataloader(self) -> Iterable[Any]:
        return Batches(self.trainer.lightning_module.sample_batches())

    def predict_dataloader(self) -> Iterable[Any]:
        return Batches(self.trainer.lightning_module.sample_batches())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The `Batch` of a `Draw`, gathered on its device; any other batch as it is."""
        if not isinstance(batch, Draw):
            return batch
        items, labels = self._on(batch.index.device, self._now)
        items = self.augmented(items.index_select(0, batch.index), batch.flip)
        return Batch(self.scaled(items), labels.index_select(0, batch.index), batch.index)

    @property
    def _now(self) -> Split:
        """The split that batches are of."""
        return "train" if self.trainer.training else "validation"

    def _on(self, device: torch.device, name: Split) -> tuple[Tensor, Tensor]:
        if (name, device) not in self._resident:
            items, labels = self.split(name)
            self._resident[name, device] = (items.to(device), labels.to(device))
        return self._resident[name, device]

    def teardown(self, stage: str) -> None:
        self._resident.clear()


class Shuffled:
    """Micro-batches without end, each item once an epoch: iterates over `Draw`.

    Micro-batch m of the run is a function of (seed, rank, world size, batch size, m) alone, so a
    resumed run needs no state: sample b of it on rank r of W is item ``perm_e[g mod n]`` with
    ``g = (m B + b) W + r`` and epoch ``e = g div n``.

    Args:
        n: number of items.
        batch_size: B, on each rank.
        seed: of the training run.
        rank: r, in [0, world_size).
        world_size: W.
        flip: draw a fair coin an item; without, no item is flipped.
        start: the micro-batch to begin with, asked for whenever an iteration begins.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        flip: bool,
        start: Callable[[], int],
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size, self.flip, self.start = rank, world_size, flip, start
        # A batch may need two epochs; each of several orders side by side keeps its own.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(n, seed, "data", epoch))

    def __iter__(self) -> Iterator[Draw]:
        return (
            Draw(self._index(m), self._flips(m), (seed_of(self.seed, "draw", self.rank, m),))
            for m in count(self.start())
        )

    def _index(self, m: int) -> Tensor:
        b = np.arange(self.batch_size, dtype=np.int64)
        epoch, place = np.divmod((m * self.batch_size + b) * self.world_size + self.rank, self.n)
        index = np.empty_like(place)
        for e in range(epoch[0], epoch[-1] + 1):  # a batch may cross the border of an epoch
            now = epoch == e
            index[now] = self._order(e)[place[now]]
        return torch.from_numpy(index)

    def _flips(self, m: int) -> Tensor:
        if not self.flip:
            return torch.zeros(self.batch_size, dtype=torch.bool)
        bits = np.random.Philox(seed_of(self.seed, "flip", self.rank, m)).random_raw(
            self.batch_size
        )
        return torch.from_numpy(bits % 2 == 1)


class Stacked:
    """The batches of several orders as one, one after another: iterates over `Draw`."""

    def __init__(self, orders: Iterable[Shuffled]) -> None:
        self.orders = list(orders)

    def __iter__(self) -> Iterator[Draw]:
        for draws in zip(*self.orders):
            index, flip, seeds = zip(*draws)
            yield Draw(torch.cat(index), torch.cat(flip), sum(seeds, ()))


class Batches:
    """Finitely many batches as one loader; Lightning takes a bare list for many loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def other(split: Split) -> Split:
    """The split that is not this one."""
    return "train" if split == "validation" else "validation"


def in_order(n: int, batch_size: int, rank: int, world_size: int) -> list[Draw]:
    """Items 0 to n - 1 once, in order, item i on rank i mod W, in batches of this rank.

    The batches are of nearly equal size, at most `batch_size`, and all ranks have equally many
    (but for a rank that nothing is left for), because validation in DDP waits for every rank.
    """
    batches = torch.arange(n).tensor_split(-(-n // (batch_size * world_size)))
    own = (batch[batch % world_size == rank] for batch in batches)
    return [Draw(index, torch.zeros_like(index, dtype=torch.bool)) for index in own if len(index)]


def permutation(n: int, *key: int | str) -> np.ndarray:
    """The order [n], int64, of a key.

    Sorts Philox's raw numbers: numpy keeps their stream for ever, that of its own `permutation`
    it may change with any version.
    """
    return np.random.Philox(seed_of(*key)).random_raw(n).argsort(kind="stable")
