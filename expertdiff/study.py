"""A study: the jobs that belong together, their folders and their budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertdiff.diffusion.partition import Partition
from expertdiff.methods.base import Method
from expertdiff.methods.mdm import MDM
from expertdiff.methods.stitched import Evaluation


@dataclass
class Study:
    """Jobs that belong together: the experts of a partition, and a baseline at equal total cost.

    Args:
        name: its folder is ``<root>/<name>``, one folder a job inside it.
        root: where studies lie.
        iterations: optimizer steps of the baseline, and of all experts together.
        budget: steps of each expert, cleanest first; by default in proportion to its interval.
        baseline: whether `launch` also trains a single network.
        evaluation: how `launch` judges the stitched experts and the baseline.
    """

    name: str = "study"
    root: Path = Path("runs")
    iterations: int = 10_000
    budget: Sequence[int] | None = None
    baseline: bool = True
    evaluation: Evaluation | None = None

    @property
    def folder(self) -> Path:
        """Everything of this study lies here."""
        return Path(self.root) / self.name

    def steps(self, method: Method) -> int:
        """Optimizer steps of the job that trains `method`."""
        if isinstance(method, MDM):
            return self.budgets(method.partition)[method.expert]
        return self.iterations

    def budgets(self, partition: Partition) -> list[int]:
        """Optimizer steps of each expert.

        Raises:
            ValueError: the explicit budget does not fit the partition or the total.
        """
        if self.budget is None:
            # Rounded at the edges, so that the sum is the total.
            ends = [round(edge * self.iterations) for edge in partition.edges]
            budgets = [hi - lo for lo, hi in zip(ends, ends[1:])]
            if min(budgets) < 1:
                raise ValueError(
                    f"study.iterations = {self.iterations} in proportion to {partition} leaves "
                    f"{budgets} steps: give more, or a study.budget"
                )
            return budgets
        if len(self.budget) != len(partition):
            raise ValueError(
                f"study.budget {list(self.budget)} names {len(self.budget)} experts, "
                f"{partition} has {len(partition)}: give one number an expert"
            )
        if min(self.budget) < 1 or sum(self.budget) > self.iterations:
            raise ValueError(
                f"study.budget {list(self.budget)} must be positive and sum to at most "
                f"study.iterations = {self.iterations}, the baseline's total"
            )
        return list(self.budget)
