"""Local experts: one network an interval, each trained alone (MDM, OpenReview cdIyf38mRw)."""

from typing import Any

from expertdiff.diffusion.partition import Interval
from expertdiff.methods.base import Method


class MDM(Method):
    """Expert `expert` of a partition; the other experts are other jobs.

    Args:
        expert: which interval of the partition this job trains; 0 is the cleanest.
        kwargs: see `Method`.

    Raises:
        ValueError: the partition has no such expert.
    """

    def __init__(self, expert: int = 0, **kwargs: Any) -> None:
        self.expert = expert  # before the first weights are drawn, which depend on it
        super().__init__(**kwargs)
        self.partition.interval(expert)  # raises early

    @property
    def interval(self) -> Interval:
        return self.partition.interval(self.expert)

    @property
    def job(self) -> str:
        return f"expert-{self.expert}"
