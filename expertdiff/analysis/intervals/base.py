"""What every way to choose intervals takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from expertdiff.analysis.intervals.segments import Cost, cheapest
from expertdiff.bundle import Bundle
from expertdiff.data.base import Data
from expertdiff.describe import Described
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import NoiseProcess

CELLS = 100
"""Of the grid that intervals are chosen on."""


class Curve(NamedTuple):
    """A line of a plot.

    Attributes:
        quantity: what y is; curves of one quantity share a panel.
        label: of this line.
        x: progress of the chain, from data (0) to noise (1), ascending.
        y: as many values.
    """

    quantity: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Selection:
    """What a method chose, and what it saw.

    Attributes:
        method: with its settings.
        partition: the intervals.
        curves: that they were read from; none where there is nothing to see.
        cost: of the partition, where the method minimises one.
    """

    method: "IntervalMethod"
    partition: Partition
    curves: Sequence[Curve] = ()
    cost: float | None = None

    @property
    def name(self) -> str:
        """Of the method's class."""
        return type(self.method).__name__


class IntervalMethod(Described, ABC):
    """A rule that cuts a chain into intervals.

    Attributes:
        source: where the rule is from.
    """

    source: ClassVar[str]

    @abstractmethod
    def __call__(
        self, k: int, process: NoiseProcess, data: Data, bundle: Bundle | None
    ) -> Selection:
        """The cut into `k` intervals.

        Args:
            k: how many.
            process: the chain.
            data: whose training split is looked at.
            bundle: a trained model of this process and data; on the CPU.

        Raises:
            ValueError: the rule does not apply, or chooses nothing.
        """


class Cells(NamedTuple):
    """A chain in up to 100 cells of equal length; a discrete one of fewer steps, step by step.

    Attributes:
        t: the middle of each cell, [n].
        partition: whose intervals are the cells; all ends are progresses of the chain's own steps.
        process: the chain.
    """

    t: Tensor
    partition: Partition
    process: NoiseProcess

    @classmethod
    def of(cls, process: NoiseProcess) -> "Cells":
        """The cells of a process."""
        middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
        n = len(process.times(middles, Interval()).unique())
        almost = torch.tensor([1 - 1e-9], dtype=torch.float64)
        # The last point of (0, j/n] is where a discrete chain can be cut; Partition rounds 1e-9.
        ends = torch.cat([process.times(almost, Interval(0, j / n)) for j in range(1, n)])
        partition = Partition([0, *process.progress(ends).tolist(), 1])
        half = torch.tensor([0.5], dtype=torch.float64)
        t = torch.cat([process.times(half, cell) for cell in partition.intervals()])
        return cls(t, partition, process)

    @property
    def progress(self) -> list[float]:
        """Of the middles, [n]."""
        return self.process.progress(self.t).tolist()

    def cut(self, k: int, cost: Cost) -> tuple[Partition, float]:
        """The cheapest partition into `k` runs of cells, and what it costs."""
        ends, total = cheapest(len(self.t), k, cost)
        return Partition([self.partition.edges[i] for i in ends]), total


def three(k: int, method: IntervalMethod) -> None:
    """Raises a ValueError unless `k` is 3."""
    if k != 3:
        raise ValueError(
            f"{type(method).__name__} finds 3 intervals, not k = {k}: set k to 3, or take a method "
            "for any k, as LogSNR"
        )


def trained(bundle: Bundle | None, method: IntervalMethod) -> Bundle:
    """`bundle`, or a ValueError where there is none."""
    if bundle is None:
        raise ValueError(f"{type(method).__name__} looks at a trained network: name a bundle")
    return bundle
