"""Experts that take turns in the memory of one network; the next is read while one works."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from expertdiff.diffusion.denoiser import Denoiser, NetworkDenoiser, Prediction


class Slot:
    """One network, and who is in it: down the chain from noise to data, then from the noise again.

    On the device are the weights of one expert, on the host those of the one being read.

    Args:
        denoiser: of the network, whatever its weights are.
        names: of the weights of each interval, cleanest first; intervals may share theirs.
        read: the weights of a name, on the CPU, which may take the memory of older ones; called in
            a thread of its own.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        names: Sequence[str],
        read: Callable[[str, dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        self.denoiser, self.names, self.read = denoiser, list(names), read
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._held: str | None = None
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._memory: dict[str, Tensor] = {}  # of the weights that were read last

    @torch.no_grad()
    def take(self, i: int) -> None:
        """Puts the weights of interval `i` into the network and begins to read the next ones.

        Raises:
            ValueError: as `read`.
        """
        name = self.names[i]
        if name != self._held:
            weights = self._awaited(name)
            self._held = None  # were the copy to fail halfway
            for key, value in self.denoiser.network.state_dict().items():
                value.copy_(weights[key])  # waits, since the next are read into the same memory
            self._held = name
        if self._coming is None:
            below = reversed(self.names[i:] + self.names[:i])  # after the cleanest, a new batch
            following = next(other for other in below if other != name)
            self._coming = following, self._pool.submit(self._fetch, following)

    def _awaited(self, name: str) -> dict[str, Tensor]:
        if self._coming is not None:
            coming, future = self._coming
            self._coming = None
            if coming == name:
                return future.result()
            future.cancel()  # a jump; and if it is being read, the pool ends that first
            del future
        return self._pool.submit(self._fetch, name).result()

    def _fetch(self, name: str) -> dict[str, Tensor]:
        memory, self._memory = self._memory, {}
        weights = self.read(name, memory)
        if next(self.denoiser.network.parameters()).is_cuda:
            for key, value in weights.items():
                weights[key] = value.pin_memory()  # which is copied faster
        self._memory = weights
        return weights


class LazyExpert(Denoiser):
    """An expert whose weights are in memory while it is called; its results are the same.

    Args:
        slot: where it takes its turn.
        i: its interval there, the first one of several that follow each other.
    """

    def __init__(self, slot: Slot, i: int) -> None:
        super().__init__()
        self.slot, self.i, self.denoiser = slot, i, slot.denoiser
        self.process, self.partition = slot.denoiser.process, slot.denoiser.partition
        self.prediction = slot.denoiser.prediction

    @property
    def flow(self) -> nn.Module | None:
        return self.denoiser.flow

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        self.slot.take(self.i)
        return self.denoiser(x_t, t, y)
