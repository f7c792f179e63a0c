"""What training has cost, as MDM counts it, and how far the sampling seeds let the figures move.

NTC, NWCT and the three points of a training are those of MDM (OpenReview cdIyf38mRw, section 4).
The paper leaves open what it means by converged: three points and absolute changes are our reading.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RESAMPLES = 1000
"""Draws of the sampling seeds behind an `Estimate`."""

Measure = Literal["iterations", "seconds"]


@dataclass(frozen=True)
class Rule:
    """When the distances of a training count as converged; both numbers have the metric's scale.

    Attributes:
        change: each of the next `changes` points changes by less than this.
        changes: how many.
        gap: and the first of them is nearer than this to the best of the whole training.

    Raises:
        ValueError: `changes` below 1, or another number that is not positive.
    """

    change: float = 0.1
    changes: int = 3
    gap: float = 0.3

    def __post_init__(self) -> None:
        if self.changes < 1 or not (self.change > 0 and self.gap > 0):
            raise ValueError(
                f"change {self.change} and gap {self.gap} must be positive, and changes "
                f"{self.changes} at least 1"
            )


@dataclass(frozen=True)
class Point:
    """A model at one point of its training.

    Attributes:
        iterations: optimizer steps so far, a number an expert; a baseline has one.
        distances: of its samples from real data, a number a sampling seed.
        seconds: wall-clock seconds of training so far, a number an expert, where measured.
    """

    iterations: Sequence[int]
    distances: Sequence[float]
    seconds: Sequence[float] | None = None


@dataclass(frozen=True)
class History:
    """The points of one training, equally spaced and all measured with the same sampling seeds.

    Attributes:
        points: in the order of their total cost.
        devices: that each expert trains on.
        shared: iterations and wall-clock seconds that were spent once, before the experts part.

    Raises:
        ValueError: no points, points in another order, or distances that are missing or not finite.
    """

    points: Sequence[Point]
    devices: int = 1
    shared: Mapping[Measure, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        totals = [sum(point.iterations) for point in self.points]
        if not totals or totals[0] <= 0 or totals != sorted(totals):
            raise ValueError(f"points of {totals} iterations: give positive totals in their order")
        seeds = sorted({len(point.distances) for point in self.points})
        if len(seeds) > 1 or seeds[0] < 1:
            raise ValueError(
                f"points have from {seeds[0]} to {seeds[-1]} distances: measure every point with "
                "the same sampling seeds"
            )
        if not np.isfinite(self.distances).all():
            total = totals[np.isfinite(self.distances).all(1).argmin()]
            raise ValueError(
                f"a distance after {total} iterations is not finite: measure that point again"
            )

    @property
    def distances(self) -> np.ndarray:
        """[P, S] of P points and S sampling seeds."""
        return np.array([point.distances for point in self.points], dtype=float)

    def spent(self, measure: Measure) -> list[Sequence[float]]:
        """The iterations or wall-clock seconds of each expert, at each point.

        Raises:
            ValueError: seconds were not measured.
        """
        spent = [getattr(point, measure) for point in self.points]
        if None in spent:
            raise ValueError(
                f"point {spent.index(None)} has no {measure}: take iterations, or a timed training"
            )
        return spent


def ntc(spent: Sequence[float], base: float) -> float:
    """Normalized training cost: 100 sum_e spent_e / base, in per cent of the baseline's.

    Args:
        spent: iterations, or seconds of wall clock times devices, of each expert.
        base: the same of the whole baseline.
    """
    return 100 * sum(spent) / base


def nwct(spent: Sequence[float], base: float) -> float:
    """Normalized wall-clock time: 100 max_e spent_e / base; the experts train side by side.

    Args:
        spent: iterations or seconds of wall clock, of each expert.
        base: the same of the whole baseline.
    """
    return 100 * max(spent) / base


def converged(distances: Sequence[float], rule: Rule) -> int | None:
    """The first point i with |d_j - d_{j-1}| < change for j = i, i+1, .. and d_i - min d < gap.

    The minimum is that of all points: known only in hindsight. ``None`` where there is none.
    """
    still = np.abs(np.diff(distances)) < rule.change  # still[i - 1] is about point i
    near = np.subtract(distances, np.min(distances)) < rule.gap
    for i in range(1, len(still) - rule.changes + 2):
        if near[i] and still[i - 1 : i - 1 + rule.changes].all():
            return i
    return None


def best(distances: Sequence[float]) -> int:
    """The first point of the smallest distance."""
    return int(np.argmin(distances))


def equivalent(distances: Sequence[float], target: float) -> int | None:
    """The first point with a distance below `target`, the baseline's best; or ``None``."""
    below = np.flatnonzero(np.less(distances, target))
    return int(below[0]) if len(below) else None


@dataclass(frozen=True)
class Estimate:
    """A figure, and how far it moves with the sampling seeds.

    Attributes:
        value: from the distances' means; ``None`` where its point was not found.
        low: 5 % quantile over resampled seeds, where found; ``None`` of a single seed.
        high: 95 % quantile, likewise.
        found: in which share of the resamples it was found; ``None`` of a single seed.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    found: float | None = None


@dataclass(frozen=True)
class Milestone:
    """A point of a training, and its cost in per cent of the whole baseline's.

    Attributes:
        point: which of the history; ``None`` where not found.
        ntc: see `ntc`.
        nwct: see `nwct`.
    """

    point: int | None
    ntc: Estimate
    nwct: Estimate


@dataclass(frozen=True)
class Account:
    """What a model cost beside its baseline.

    Attributes:
        baseline: its milestones ``converged`` and ``best``.
        model: ``converged``, ``best`` and ``equivalent`` (better than the baseline's best).
        speed_up: NWCT of the baseline's best / NWCT of the equivalent point.
        saving: of training cost, at the same two points; per cent.
        saving_wall: of wall-clock time, likewise.
        seed_std: standard deviation of one distance between sampling seeds, pooled over all
            points; ``None`` of a single seed. Where `Rule.change` is no larger, chance has its say
            in what counts as converged.
    """

    baseline: dict[str, Milestone]
    model: dict[str, Milestone]
    speed_up: Estimate
    saving: Estimate
    saving_wall: Estimate
    seed_std: float | None


def account(baseline: History, model: History, rule: Rule, measure: Measure) -> Account:
    """The figures of MDM's Table 2, and its headlines, with the uncertainty of the sampling.

    The baseline's last point is 100 %. For the uncertainty the sampling seeds are drawn 1000 times
    with replacement, each time the same for every point of both models, and everything is found
    again from the means. This tells of the noise of the distance alone, not of other training
    seeds; and of S seeds the spread of a mean comes out too small by a factor sqrt(1 - 1/S).

    Raises:
        ValueError: other numbers of sampling seeds in both, or seconds that were not measured.
    """
    seeds = [history.distances.shape[1] for history in (model, baseline)]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"{seeds[0]} sampling seeds of the model and {seeds[1]} of the baseline cannot be "
            "paired: measure both with the same"
        )
    curves, targets = _resampled(model.distances), _resampled(baseline.distances)
    found, goal = _found(curves, rule), _found(targets, rule)
    found["equivalent"] = [equivalent(row, target) for row, target in zip(curves, targets.min(1))]
    ours, theirs = costs(model, baseline, measure), costs(baseline, baseline, measure)
    ratio = _at(found["equivalent"], ours) / _at(goal["best"], theirs)
    return Account(
        baseline={name: _milestone(points, theirs) for name, points in goal.items()},
        model={name: _milestone(points, ours) for name, points in found.items()},
        speed_up=_estimate(1 / ratio[:, 1]),
        saving=_estimate(100 * (1 - ratio[:, 0])),
        saving_wall=_estimate(100 * (1 - ratio[:, 1])),
        seed_std=_seed_std(np.vstack([model.distances, baseline.distances])),
    )


def _resampled(distances: np.ndarray) -> np.ndarray:
    """Curves [R, P] of distances [P, S]: the mean over the seeds, then those of other draws."""
    seeds = distances.shape[1]
    draws = np.arange(seeds)[None]
    if seeds > 1:  # numpy keeps the raw stream for ever
        raw = np.random.Philox(0).random_raw(RESAMPLES * seeds).reshape(RESAMPLES, seeds)
        draws = np.vstack([draws, (raw % seeds).astype(int)])
    return distances[:, draws].mean(-1).T


def _found(curves: np.ndarray, rule: Rule) -> dict[str, list[int | None]]:
    return {
        "converged": [converged(row, rule) for row in curves],
        "best": [best(row) for row in curves],
    }


def costs(history: History, baseline: History, measure: Measure) -> np.ndarray:
    """NTC and NWCT [P, 2] of each point, the baseline's last being 100; devices count in NTC."""
    devices = (history.devices, baseline.devices) if measure == "seconds" else (1, 1)
    base = sum(baseline.spent(measure)[-1])
    total, shared = base * devices[1] / devices[0], history.shared.get(measure, 0)
    return np.array(
        [
            (ntc([*spent, shared], total), nwct([each + shared for each in spent], base))
            for spent in history.spent(measure)
        ]
    )


def _at(points: Sequence[int | None], spent: np.ndarray) -> np.ndarray:
    """The rows of `spent` at `points`, NaN for ``None``."""
    rows = np.vstack([spent, np.full(2, np.nan)])
    return rows[[-1 if point is None else point for point in points]]


def _milestone(points: Sequence[int | None], spent: np.ndarray) -> Milestone:
    return Milestone(points[0], *(_estimate(values) for values in _at(points, spent).T))


def _estimate(values: np.ndarray) -> Estimate:
    """Of the value itself and then the resampled ones, NaN where not found."""
    value, resampled = None if np.isnan(values[0]) else float(values[0]), values[1:]
    found = resampled[~np.isnan(resampled)]
    low, high = np.quantile(found, (0.05, 0.95)).tolist() if len(found) else (None, None)
    return Estimate(value, low, high, len(found) / len(resampled) if len(resampled) else None)


def _seed_std(distances: np.ndarray) -> float | None:
    if distances.shape[1] < 2:
        return None
    return math.sqrt(distances.var(1, ddof=1).mean())
