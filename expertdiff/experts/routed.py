"""A hard route: each point of the chain belongs to one of several denoisers (MDM)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.partition import Partition


class RoutedExperts(Denoiser):
    """N denoisers, each acting where its interval of the partition holds t.

    Args:
        experts: one denoiser an interval, cleanest first, all of the same noise process.
        partition: who owns which t.

    Raises:
        ValueError: as many experts as intervals are needed, and all behind the same flow.
    """

    def __init__(self, experts: Sequence[Denoiser], partition: Partition) -> None:
        super().__init__()
        if len(experts) != len(partition):
            raise ValueError(
                f"{len(experts)} experts cannot serve the {len(partition)} intervals of {partition}"
            )
        if not all(_same_flow(experts[0].flow, expert.flow) for expert in experts):
            raise ValueError(
                "experts behind different flows cannot share a chain: start them from the same run "
                "of INDM (model.init_from)"
            )
        # Between neighbours that are one and the same there is no border.
        first = [i for i, expert in enumerate(experts) if i == 0 or expert is not experts[i - 1]]
        self.experts = nn.ModuleList(experts[i] for i in first)
        self.partition = Partition([*(partition.edges[i] for i in first), 1])
        self.process = experts[0].process

    @property
    def flow(self) -> nn.Module | None:
        return self.experts[0].flow

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        owner = self.partition.index(self.process.progress(t))
        owners = owner.unique().tolist()
        if len(owners) == 1:
            return self.experts[owners[0]](x_t, t, y)
        parts = []
        for i in owners:
            mine = owner == i
            parts.append(self.experts[i](x_t[mine], t[mine], None if y is None else y[mine]))
        # Stable: the inverse of "sorted by owner" puts every sample back in its place.
        back = owner.argsort(stable=True).argsort().to(x_t.device)
        variances = [part.variance for part in parts]
        return Prediction(
            x0=torch.cat([part.x0 for part in parts])[back],
            eps=torch.cat([part.eps for part in parts])[back],
            variance=None if variances[0] is None else torch.cat(variances)[back],
        )


def _same_flow(a: nn.Module | None, b: nn.Module | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def owner_of(t: Tensor, partition: Partition, T: int) -> Tensor:
    """Who owns each timestep [B] of a chain of `T`, for networks that route by themselves.

    Raises:
        ValueError: t is of continuous time.
    """
    if t.is_floating_point():
        raise ValueError(
            f"experts of one network own integer timesteps, not t of {t.dtype}: use a DiscreteVP "
            "process"
        )
    return partition.index((t + 1).double() / T)


def by_owner(owner: Tensor, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``run(i, *rows)`` [B, ...] with the rows of each owner i [B], every one in its place.

    Args:
        owner: of each row; it may lie on the CPU.
        run: what owner i makes of its rows.
        inputs: each [B, ...].
    """
    owners, counts = torch.stack(owner.unique(return_counts=True)).tolist()
    if len(owners) == 1:
        return run(owners[0], *inputs)
    order = owner.argsort(stable=True).to(inputs[0].device)
    parts = [rows[order].split(counts) for rows in inputs]
    outputs = [run(i, *part) for i, *part in zip(owners, *parts)]
    return torch.cat(outputs)[order.argsort()]
