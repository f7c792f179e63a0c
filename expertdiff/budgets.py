"""How the iterations of a study are shared among its experts: at the start, or as they train."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from expertdiff.describe import Described, describe, differences
from expertdiff.diffusion.partition import Partition

Entry = dict[str, Any]
"""A decision of `Adaptive`, plain data: see its `next`."""


class Budget(Described, ABC):
    """A rule for the optimizer steps of each expert, together at most the baseline's."""

    @abstractmethod
    def allot(self, partition: Partition, iterations: int) -> list[int]:
        """Optimizer steps of each expert, cleanest first, before anything has been trained.

        Args:
            partition: the experts' intervals.
            iterations: what all may take together.

        Raises:
            ValueError: the rule does not fit the partition or the total.
        """


def as_budget(budget: Budget | Sequence[int] | None) -> Budget:
    """The rule that ``study.budget`` stands for: nothing is `Proportional`, numbers `Explicit`."""
    if budget is None:
        return Proportional()
    return budget if isinstance(budget, Budget) else Explicit(budget)


class Proportional(Budget):
    """Each expert's share is the length of its interval (the start of MDM, section 4)."""

    def allot(self, partition: Partition, iterations: int) -> list[int]:
        # Rounded at the edges, so that the sum is the total.
        ends = [round(edge * iterations) for edge in partition.edges]
        budgets = [hi - lo for lo, hi in zip(ends, ends[1:])]
        if min(budgets) < 1:
            raise ValueError(
                f"{iterations} study.iterations in proportion to {partition} leave "
                f"{budgets} steps: give more, or a study.budget"
            )
        return budgets


class Explicit(Budget):
    """These numbers.

    Args:
        steps: of each expert, cleanest first.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)

    def allot(self, partition: Partition, iterations: int) -> list[int]:
        if len(self.steps) != len(partition):
            raise ValueError(
                f"study.budget {self.steps} names {len(self.steps)} experts, "
                f"{partition} has {len(partition)}: give one number an expert"
            )
        if min(self.steps) < 1 or sum(self.steps) > iterations:
            raise ValueError(
                f"study.budget {self.steps} must be positive and sum to at most "
                f"{iterations}, what study.iterations leaves to the experts"
            )
        return list(self.steps)


class Adaptive(Budget):
    """Trains in rounds, stops experts that have converged, gives what they leave to the slowest.

    All begin with their share of `Proportional`; in each round an expert trains an equal part of
    what it has left. What the stopped leave is dealt out likewise, each round its part, to the one
    that is the slowest then; when all have stopped, it is saved.

    How fast a validation loss, or the distance of the stitched experts, still falls is
    ``(1 - after / before) / (steps / iterations)``: by how much of itself it would fall if all
    iterations of the study went on at this pace. An expert is stopped when its loss falls too
    slowly and, once distances are known, the distance with it, because a flat loss may hide a
    distance that still falls. The slowest is the one whose distance (before the first check point:
    whose loss) falls fastest. MDM (OpenReview cdIyf38mRw, section 4) says only that the slow
    experts get what the fast ones leave; this rule and its defaults are ours.

    Decisions are the entries of a ledger, plain data, each a function of the earlier ones and of
    what was measured. A study is: `start`; train every expert to ``until``; end if that is
    ``budgets``; else measure, append what `next` decides, and train on.

    Args:
        rounds: in how many parts an expert trains.
        check_points: rounds after which distances are measured, from 2 to ``rounds - 1``.
        patience: over how many rounds the fall of the loss is taken.
        loss_fall: the fall of the loss below which an expert may have converged.
        distance_fall: likewise, of the distance.

    Raises:
        ValueError: check points that are no such rounds in order, or too few rounds to decide.
    """

    def __init__(
        self,
        rounds: int = 10,
        check_points: Sequence[int] = (),
        patience: int = 2,
        loss_fall: float = 0.02,
        distance_fall: float = 0.1,
    ) -> None:
        if not 1 <= patience < rounds - 1:
            raise ValueError(
                f"{rounds} rounds with patience {patience} decide nothing: give a patience of at "
                "least 1, and at least two rounds more than that"
            )
        if list(check_points) != sorted({*check_points} & {*range(2, rounds)}):
            raise ValueError(
                f"check_points {list(check_points)} must be increasing rounds from 2 to "
                f"{rounds - 1}, because a check compares two rounds and decides on the next"
            )
        self.rounds, self.check_points, self.patience = rounds, check_points, patience
        self.loss_fall, self.distance_fall = loss_fall, distance_fall

    def allot(self, partition: Partition, iterations: int) -> list[int]:
        budgets = Proportional().allot(partition, iterations)
        if min(budgets) < self.rounds:
            raise ValueError(
                f"{iterations} study.iterations in proportion to {partition} leave {budgets} "
                f"steps, too few for {self.rounds} rounds: give more, or fewer rounds"
            )
        return budgets

    def start(self, partition: Partition, iterations: int, settings: dict[str, Any]) -> Entry:
        """The first entry of a ledger.

        Args:
            partition: the experts' intervals.
            iterations: what all may take together.
            settings: whatever else makes the study this one, as plain data; its digest is kept.
        """
        budgets = self.allot(partition, iterations)
        text = json.dumps(settings, sort_keys=True)
        return {
            "round": 0,
            "rule": describe(self),
            "partition": list(partition.edges),
            "iterations": iterations,
            "settings": hashlib.sha256(text.encode()).hexdigest(),
            "budgets": budgets,
            "until": [budget // self.rounds for budget in budgets],
            "check": None,
        }

    def next(self, ledger: Sequence[Entry], observations: dict[str, Any]) -> Entry:
        """The decision once all experts have trained to the last entry's ``until``.

        Args:
            ledger: all entries so far.
            observations: ``losses``, of each expert in its interval; if the last entry's ``check``
                holds steps, also ``distance``, of the experts stitched at these, and ``advanced``,
                for each expert the distance with it alone at ``until`` (`distance` for one that
                has stopped). All positive.

        Returns:
            ``round``, ``inputs`` (the observations), ``falls`` (of each expert, ``None`` while
            unknown), ``stopped`` (experts), ``given`` (steps to each), ``budgets``, ``until``,
            ``check``.

        Raises:
            ValueError: the observations are not those that are due, or all is decided.
        """
        now, last = len(ledger), ledger[-1]
        rounds = self.rounds - now  # that are left
        steps, budgets = last["until"], last["budgets"]
        training = [e for e in range(len(steps)) if steps[e] < budgets[e]]
        if not training:
            raise ValueError(f"after round {now} nothing is left to decide: end the study here")
        inputs = _due(observations, last, now)
        falls = self._falls([*ledger, {"inputs": inputs}])
        stopped = [e for e in training if self._converged(e, **falls)]
        going = [e for e in training if e not in stopped]
        kept = [steps[e] if e in stopped else budgets[e] for e in range(len(steps))]
        given, rest = [0] * len(steps), ledger[0]["iterations"] - sum(kept)
        if rest and going:
            pace = falls["distance"] or falls["loss"]
            given[max(going, key=lambda e: pace[e])] = rest // rounds
        before = max((c for c in self.check_points if c <= now), default=1)
        return {
            "round": now,
            "inputs": inputs,
            "falls": falls,
            "stopped": stopped,
            "given": given,
            "budgets": [k + g for k, g in zip(kept, given)],
            "until": [s + (k - s) // rounds + g for s, k, g in zip(steps, kept, given)],
            "check": ledger[before - 1]["until"] if now + 1 in self.check_points else None,
        }

    def _falls(self, ledger: Sequence[Entry]) -> dict[str, list[float] | None]:
        """Of the losses and of the distances, where they are known after the last entry's round."""
        iterations, now = ledger[0]["iterations"], len(ledger) - 1
        falls: dict[str, list[float] | None] = {"loss": None, "distance": None}
        if (then := now - self.patience) >= 1:
            before, after = (ledger[r]["inputs"]["losses"] for r in (then, now))
            steps = ledger[then - 1]["until"], ledger[now - 1]["until"]
            falls["loss"] = _falls_of(before, after, *steps, iterations)
        if checked := max((c for c in self.check_points if c <= now), default=0):
            inputs, trained = ledger[checked]["inputs"], ledger[checked - 1]
            before = [inputs["distance"]] * len(inputs["advanced"])
            steps = trained["check"], trained["until"]
            falls["distance"] = _falls_of(before, inputs["advanced"], *steps, iterations)
        return falls

    def _converged(self, e: int, loss: list[float] | None, distance: list[float] | None) -> bool:
        flat = loss is not None and loss[e] < self.loss_fall
        return flat and (distance is None or distance[e] < self.distance_fall)

    def replay(self, ledger: Sequence[Entry], start: Entry) -> None:
        """Decides everything again from what was measured; `start` is this study's own.

        Raises:
            ValueError: a decision differs, or the ledger is none, or of another study.
        """
        if not (isinstance(ledger, list) and ledger and all(map(_is_entry, ledger))):
            raise ValueError(
                f"a ledger of {json.dumps(ledger)[:40]} holds no decisions: restore the file as it "
                "was written"
            )
        if changed := differences(start, ledger[0]):
            raise ValueError(
                f"the ledger is of another study ({'; '.join(changed)}): give this one another "
                "name, or restore its settings"
            )
        ours = [start]
        for entry in ledger[1:]:
            ours.append(self.next(ours, entry.get("inputs", {})))
            if changed := differences(ours[-1], entry):
                raise ValueError(
                    f"the decision after round {len(ours) - 1} does not follow from the ledger "
                    f"({'; '.join(changed)}): restore the file as it was written"
                )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("inputs", {}), dict)


def _falls_of(
    before: Sequence[float],
    after: Sequence[float],
    start: Sequence[int],
    end: Sequence[int],
    iterations: int,
) -> list[float]:
    # A stopped expert has trained no step, and is no longer asked about.
    steps = [max(1, hi - lo) for lo, hi in zip(start, end)]
    return [(1 - b / a) * iterations / n for a, b, n in zip(before, after, steps)]


def _due(observations: dict[str, Any], last: Entry, now: int) -> dict[str, Any]:
    """The observations as plain data, if they are those that are due after round `now`."""
    experts = len(last["until"])
    due = {"losses": experts}
    if last["check"]:
        due |= {"distance": 1, "advanced": experts}
    if observations.keys() != due.keys():
        raise ValueError(
            f"after round {now} a decision needs {', '.join(due)}, not "
            f"{', '.join(observations) or 'nothing'}: measure what is due"
        )
    inputs = describe(observations)
    for name, values in inputs.items():
        numbers = values if isinstance(values, list) else [values]
        positive = all(isinstance(v, (int, float)) and 0 < v < math.inf for v in numbers)
        if len(numbers) != due[name] or not positive:
            raise ValueError(
                f"{name} {values} after round {now} cannot be used: give a positive number, where "
                "it is asked of each expert one for each"
            )
    return inputs
