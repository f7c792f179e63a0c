"""A study: the jobs that belong together, their folders and their budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertdiff.budgets import Adaptive, Budget, as_budget
from expertdiff.diffusion.partition import Partition
from expertdiff.methods.base import Method
from expertdiff.methods.mdm import MDM
from expertdiff.methods.single import Shared
from expertdiff.methods.stitched import Evaluation


@dataclass
class Study:
    """Jobs that belong together: the experts of a partition, and a baseline at equal total cost.

    Args:
        name: its folder is ``<root>/<name>``, one folder a job inside it.
        root: where studies lie.
        iterations: optimizer steps of the baseline, and of all experts together.
        budget: steps of each expert, cleanest first, or a rule for them, as `Adaptive`; by default
            in proportion to its interval.
        shared: of these iterations, how many a single network trains on the whole chain before the
            experts, which then start from its averaged weights.
        baseline: whether `launch` also trains a single network.
        evaluation: how `launch` judges the stitched experts and the baseline.
    """

    name: str = "study"
    root: Path = Path("runs")
    iterations: int = 10_000
    # Budget first: of a union, the parser tells the first one's errors.
    budget: Budget | Sequence[int] | None = None
    shared: int = 0
    baseline: bool = True
    evaluation: Evaluation | None = None

    @property
    def folder(self) -> Path:
        """Everything of this study lies here."""
        return Path(self.root) / self.name

    def steps(self, method: Method) -> int:
        """Optimizer steps of the job that trains `method`.

        Raises:
            ValueError: as `budgets`, or an expert whose steps are not known before it is trained.
        """
        if isinstance(method, MDM):
            if isinstance(self.budget, Adaptive):
                raise ValueError(
                    f"the Adaptive budget of {method.job} is decided in rounds by expertdiff "
                    "launch: launch the study, or give study.budget in numbers"
                )
            return self.budgets(method.partition)[method.expert]
        return self.shared if isinstance(method, Shared) else self.iterations

    @property
    def apart(self) -> int:
        """Optimizer steps of all experts together, after those that they share.

        Raises:
            ValueError: nothing is left.
        """
        if not 0 <= self.shared < self.iterations:
            raise ValueError(
                f"study.shared {self.shared} must be in [0, {self.iterations}), because it is a "
                "part of study.iterations"
            )
        return self.iterations - self.shared

    def budgets(self, partition: Partition) -> list[int]:
        """Optimizer steps of each expert; of an adaptive budget, before anything was trained.

        Raises:
            ValueError: the budget does not fit the partition or the total.
        """
        return as_budget(self.budget).allot(partition, self.apart)
