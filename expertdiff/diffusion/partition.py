"""Who owns which part of the chain: the only place that decides it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from expertdiff.describe import Described


@dataclass(frozen=True)
class Interval:
    """The points of the chain with lo < progress <= hi; progress 0 is data, 1 is noise."""

    lo: float = 0.0
    hi: float = 1.0

    def steps(self, T: int) -> range:
        """The integer timesteps of a chain of `T` in this interval: lo < (t+1)/T <= hi, exactly."""
        return range(int(_exact(self.lo) * T), int(_exact(self.hi) * T))

    def contains(self, other: "Interval") -> bool:
        """Whether every point of `other` lies in this interval."""
        return self.lo <= other.lo and other.hi <= self.hi

    def __str__(self) -> str:
        return f"({self.lo:g}, {self.hi:g}]"


@dataclass(frozen=True)
class Partition(Described):
    """Intervals (edges[i], edges[i+1]] of the chain, one an expert; expert 0 is the cleanest.

    The literature's 1-based (lo, hi] and 0-based [lo, hi) timesteps are the same sets, because a
    discrete t has progress (t+1)/T.

    Args:
        edges: strictly increasing, from 0 to 1, for example ``[0, 0.1, 0.8, 1]``.

    Raises:
        ValueError: the edges do not partition (0, 1].
    """

    edges: Sequence[float]

    def __post_init__(self) -> None:
        edges = []
        if all(map(math.isfinite, self.edges)):
            # Through fractions, so that 0.1 + 0.2 and 0.3 are the same edge.
            edges = [float(_exact(edge)) for edge in self.edges]
        increasing = all(lo < hi for lo, hi in zip(edges, edges[1:]))
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not increasing:
            raise ValueError(
                f"edges {list(self.edges)} do not partition (0, 1]: give increasing numbers from "
                "0 to 1, for example [0, 0.1, 0.8, 1]"
            )
        object.__setattr__(self, "edges", tuple(edges))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def interval(self, i: int) -> Interval:
        """The interval of expert `i`."""
        if not 0 <= i < len(self):
            raise ValueError(f"expert {i} does not exist: {self} has experts 0 to {len(self) - 1}")
        return Interval(self.edges[i], self.edges[i + 1])

    def intervals(self) -> list[Interval]:
        """All intervals, cleanest first."""
        return [self.interval(i) for i in range(len(self))]

    def index(self, progress: Tensor) -> Tensor:
        """The owner (int64) of each progress (float64, in (0, 1]).

        Exact for a discrete chain: (t+1)/T and the edges are correctly rounded in float64, so they
        compare as the rationals do. In float32 they would not (10 of 1000 steps at N = 20).
        """
        if progress.dtype != torch.float64:
            raise ValueError(
                f"routing needs progress in float64, not {progress.dtype}: pass process.progress(t)"
            )
        return torch.bucketize(progress, _on(progress.device, self.edges[1:-1]))

    def __str__(self) -> str:
        return f"partition [{', '.join(f'{edge:g}' for edge in self.edges)}]"


@lru_cache
def _on(device: torch.device, edges: tuple[float, ...]) -> Tensor:
    # Kept, because a copy to a GPU would wait for everything the GPU still has to do.
    return torch.tensor(edges, dtype=torch.float64, device=device)


def _exact(edge: float) -> Fraction:
    """The rational that a rounded edge stands for."""
    return Fraction(edge).limit_denominator(10**6)
