"""Two bundles, and the models between them: A, with B's experts in some intervals of the chain."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from expertdiff.bundle import Bundle
from expertdiff.describe import describe, differences
from expertdiff.devices import accelerator
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.experts.routed import RoutedExperts
from expertdiff.methods.stitched import Evaluation, Stitched


class Pair:
    """Two bundles, A and B, from whose experts samples are drawn, always from the same noise.

    Args:
        a: the one bundle.
        b: the other.
        protocol: how samples are drawn, with one seed.
        edges: of the intervals; by default those of both bundles.

    Attributes:
        partition: of these edges.
        models: the intervals in which B acts, by the name of the model: of A none, of B all, then
            one after another, cleanest first, where there is more than one.

    Raises:
        ValueError: the bundles do not fit together, or fewer than 2 samples are to be drawn.
    """

    def __init__(
        self, a: Bundle, b: Bundle, protocol: Evaluation, edges: Sequence[float] | None = None
    ) -> None:
        if changed := differences(_common(a), _common(b)):
            raise ValueError(
                f"{a.folder} and {b.folder} do not make samples of one kind from the same noise "
                f"({'; '.join(changed)}): name two that agree in this"
            )
        if protocol.samples < 2:
            raise ValueError(f"samples {protocol.samples} cannot be shuffled: give 2 or more")
        self.a, self.b, self.protocol = a, b, protocol
        self.partition = Partition(edges or sorted({*a.partition.edges, *b.partition.edges}))
        intervals = self.partition.intervals()
        self.models = {"A": [], "B": list(range(len(intervals)))}
        if len(intervals) > 1:
            self.models |= {f"A with B in {part}": [i] for i, part in enumerate(intervals)}
        self._stitched = Stitched(a.folder, protocol)
        self._trainer = Trainer(
            devices=1,
            accelerator=accelerator(),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )

    @property
    def device(self) -> torch.device:
        """Where samples are drawn."""
        return self._trainer.strategy.root_device

    def draw(self, of_b: Collection[int]) -> Tensor:
        """Samples [N, ...] of A with B in these intervals, as the data set holds its items."""
        self._stitched.denoiser = swapped(self.a.denoiser, self.b.denoiser, self.partition, of_b)
        return torch.cat([part for _, part, _ in self._trainer.predict(self._stitched)])

    def calls(self) -> list[int]:
        """How often each interval's denoiser is called while one sample is drawn."""
        process = self.a.denoiser.process
        owners = self.partition.index(process.progress(self.protocol.sampler.calls(process)))
        return owners.bincount(minlength=len(self.partition)).tolist()

    def shuffled(self) -> Tensor:
        """For each sample the index [N] of another one; but for one a class, of the same class."""
        n, (seed,) = self.protocol.samples, self.protocol.seeds
        labels = self._stitched.labels(seed, torch.arange(n))
        order = torch.arange(n) if labels is None else labels.cpu().argsort(stable=True)
        # Pairs keep their label, which makes samples alike by itself, and lose their noise.
        return torch.empty_like(order).index_copy_(0, order, order.roll(-1))

    def description(self) -> dict[str, Any]:
        """What is compared and how it is drawn, as plain data."""
        return {
            "a": self.a.named,
            "b": self.b.named,
            "partition": list(self.partition.edges),
            "calls": self.calls(),
            "sampler": describe(self.protocol.sampler),
            "samples": self.protocol.samples,
            "seed": self.protocol.seeds[0],
        }


def swapped(a: Denoiser, b: Denoiser, partition: Partition, of_b: Collection[int]) -> RoutedExperts:
    """A with B's experts in the intervals `of_b` of a partition; with all of them it is B."""
    edges = sorted({*partition.edges, *a.partition.edges, *b.partition.edges})
    experts = []
    for end in torch.tensor(edges[1:], dtype=torch.float64):
        side = b if partition.index(end).item() in of_b else a
        routed = isinstance(side, RoutedExperts)
        experts.append(side.experts[side.partition.index(end).item()] if routed else side)
    return RoutedExperts(experts, Partition(edges))


def _common(bundle: Bundle) -> dict[str, Any]:
    """What two bundles must have in common."""
    shared = bundle.manifest["shared"]
    return {
        "shape": list(bundle.shape),
        "scale": shared["data"]["scale"],
        "num_classes": bundle.num_classes,
        "process": shared["process"],
    }
