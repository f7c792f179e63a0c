"""The seam between drawn samples and the numbers that are told about them."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertdiff.describe import Described


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
        summary: as `Judge.summary` makes them.
        name: the data's split, or a file and its digest.
        count: items it was made of; ``None`` where a file does not tell.
    """

    summary: Any
    name: str
    count: int | None

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.name} ({'statistics' if self.count is None else f'{self.count} items'})"


class Judge(Described, nn.Module, ABC):
    """Compares drawn samples with real ones, given as their data set holds them.

    Attributes:
        metric: the name of the headline number, the first of `distances`.
        estimate: whether it is an estimate that real data bias alike, so that the nearest to their
            number is the best; else the lowest is.
        keeps: whether it leaves what it computes of real items to the next test, as it takes long.
    """

    metric: str
    estimate: bool = False
    keeps: bool = False

    # A signature of its own: `describe` would write down nn.Module's *args and **kwargs.
    def __init__(self) -> None:
        super().__init__()

    @property
    @abstractmethod
    def identity(self) -> str:
        """What must be equal for two numbers to be comparable; part of every result.

        Loads and checks whatever the judge needs: ask before hours of sampling, not after.
        """

    @property
    def own_reference(self) -> str:
        """The name of what it compares with instead of the data's own items; "" where nothing."""
        return ""

    @abstractmethod
    def forward(self, samples: Tensor) -> Tensor:
        """What is kept of samples [B, ...]: features [B, D], float32, on their device."""

    @abstractmethod
    def summary(self, features: Tensor) -> Any:
        """What is compared, of the features [N, D] of a whole set."""

    def real(self, items: Tensor, device: torch.device) -> Any:
        """The summary of real items [N, ...], which lie on the CPU."""
        return self.summary(self(items.to(device)))

    def reference(self, name: str, items: Tensor, device: torch.device) -> Reference:
        """What samples are compared with, where the data's own split is `name` of `items`."""
        return Reference(self.real(items, device), name, len(items))

    @abstractmethod
    def distances(self, samples: Any, reference: Any) -> dict[str, float]:
        """Named numbers of one summary against another, the headline first."""
