"""Memory that is used again."""

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 2**17  # bytes; below, allocators keep the memory themselves


class Memory:
    """New tensors in the memory of older ones that are gone.

    A CPU gets memory for large tensors from the system and gives it back. Where the same sizes come
    and go at each step, getting their pages takes longer than computing what is in them. On a GPU
    PyTorch keeps the memory itself.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`; what it lies in is free again when the last tensor in it is gone."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < SMALL:
            return torch.empty(shape, dtype=dtype, device=device)
        free = self._free[size]
        block = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        lent = block.numpy()  # an array of its own, which lives as long as the storage made of it
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.frombuffer(lent, dtype=dtype).view(shape)
