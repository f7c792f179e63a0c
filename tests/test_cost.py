"""Cost by the paper's definitions, on curves whose answers are known."""

import numpy as np
import pytest

from expertdiff.analysis.cost import (
    History,
    Point,
    Rule,
    account,
    best,
    converged,
    costs,
    equivalent,
    ntc,
    nwct,
)

RULE = Rule()


def history(curve, totals, seeds=(0.0,), **kwargs):
    """A single network with these distances at these iterations; a shift a seed."""
    points = [Point([n], [d + shift for shift in seeds]) for n, d in zip(totals, curve)]
    return History(points, **kwargs)


def brute_force(distances, rule):
    """The rule of the specification, word by word, by indices from 0."""
    for i in range(len(distances)):
        window = range(i, i + rule.changes)
        if window[0] < 1 or window[-1] >= len(distances):
            continue
        if distances[i] - min(distances) < rule.gap and all(
            abs(distances[j] - distances[j - 1]) < rule.change for j in window
        ):
            return i
    return None


class TestPoints:
    def test_a_curve_that_settles(self):
        assert converged([9, 5, 3, 2.95, 2.93, 2.92, 2.92], RULE) == 3

    def test_too_short_a_curve_never_converges(self):
        assert converged([3, 3, 3], RULE) is None
        assert converged([3, 3, 3, 3], RULE) == 1

    def test_a_single_point(self):
        assert converged([3], RULE) is None and best([3]) == 0

    def test_a_late_dip_moves_the_point_to_where_it_is_near_the_best(self):
        flat, dip = [5, 3, 3, 3, 3], [2.5, 2.5, 2.5, 2.5]
        assert converged(flat, RULE) == 2
        assert converged(flat + dip, RULE) == 6  # not 2, and not 5, where it still falls
        assert best(flat + dip) == 5

    def test_a_spike_breaks_the_three_in_a_row(self):
        assert converged([5, 3, 3, 3.2, 3, 3, 3, 3], RULE) == 5
        assert converged([5, 3, 3, 3.2, 3, 3, 3], RULE) is None

    def test_a_change_of_the_very_threshold_is_no_standstill(self):
        rule = Rule(change=0.25, gap=1)
        assert converged([1, 0.75, 0.5, 0.25], rule) is None
        assert converged([1, 0.76, 0.52, 0.28], rule) == 1

    def test_thresholds_scale_with_the_metric(self):
        curve = np.array([9, 5, 3, 2.95, 2.93, 2.92, 2.92])
        assert converged(curve / 100, Rule(0.001, 3, 0.003)) == converged(curve, RULE)

    @pytest.mark.parametrize(
        "rule", [{"changes": 0}, {"change": 0}, {"change": float("nan")}, {"gap": -1}]
    )
    def test_a_rule_that_nothing_or_everything_meets_is_refused(self, rule):
        ((name, value),) = rule.items()
        with pytest.raises(ValueError, match=f"{name} {value}"):
            Rule(**rule)

    def test_equals_brute_force(self):
        generator = np.random.default_rng(0)
        found = set()
        for _ in range(500):
            curve = generator.normal(0, 0.12, generator.integers(1, 12)).round(2)
            rule = Rule(changes=int(generator.integers(1, 4)))
            found.add(point := brute_force(curve, rule))
            assert converged(curve, rule) == point
        assert {None, 1, 2, 3} <= found

    def test_best_is_the_first_of_equals(self):
        assert best([3, 1, 2, 1]) == 1

    def test_equivalent_is_the_first_below_not_at_the_target(self):
        assert equivalent([3, 2, 1, 2], 2) == 2
        assert equivalent([3, 2, 1, 0.5], 2) == 2
        assert equivalent([3, 2], 2) is None


class TestCosts:
    def test_paper_budget(self):
        spent = [50_000, 350_000, 100_000]
        assert ntc(spent, 500_000) == 100 and nwct(spent, 500_000) == 70

    def test_one_expert_of_the_full_budget_costs_all(self):
        assert ntc([500], 500) == nwct([500], 500) == 100

    # Table 2 of the paper: best of the baseline; NWCT and NTC of the equivalent and best point.
    @pytest.mark.parametrize(
        "goal, equal, top, speed_up, saving, wall",
        [
            (76.0, (17.5, 35.7), (43.4, 62.0), 4.34, 53.0, 77.0),
            (48.0, (17.9, 36.3), (39.2, 57.4), 2.68, 24.4, 62.7),
            (86.0, (18.4, 42.0), (31.2, 67.6), 4.67, 51.2, 78.6),
        ],
        ids=["ADM", "P2W", "ST"],
    )
    def test_headlines_of_the_paper(self, goal, equal, top, speed_up, saving, wall):
        per_cent = np.arange(1, 51) * 2.0
        baseline = history(12.42 + abs(per_cent - goal) / 20, (per_cent * 5000).astype(int))
        points = []
        for (longest, total), distance in (((5, 9), 15), (equal, 12.3), (top, 11.42)):
            shares = [(total - longest) / 2, (total - longest) / 2, longest]
            points.append(Point([round(5000 * share) for share in shares], [distance]))
        found = account(baseline, History(points), RULE, "iterations")
        assert found.baseline["best"].ntc.value == found.baseline["best"].nwct.value == goal
        assert found.model["equivalent"].point == 1
        for name, (longest, total) in (("equivalent", equal), ("best", top)):
            assert found.model[name].nwct.value == pytest.approx(longest)
            assert found.model[name].ntc.value == pytest.approx(total)
        assert round(found.speed_up.value, 2) == speed_up
        assert round(found.saving.value, 1) == saving
        assert round(found.saving_wall.value, 1) == wall
        assert found.seed_std is None and found.saving.low is found.saving.found is None

    def test_seconds_are_counted_as_they_were_measured(self):
        base = [Point([n], [d], [2.0 * n]) for n, d in ((50, 3.0), (100, 2.0))]
        points = [
            Point([20, 40], [2.5], [10.0, 60.0]),
            Point([40, 60], [1.5], [20.0, 90.0]),
        ]
        found = account(History(base), History(points), RULE, "seconds")
        equal = found.model["equivalent"]
        assert (equal.ntc.value, equal.nwct.value) == (55.0, 45.0)
        assert found.speed_up.value == pytest.approx(200 / 90)
        assert found.saving.value == pytest.approx(45)
        steps = account(History(base), History(points), RULE, "iterations")
        assert steps.model["equivalent"].ntc.value == 100
        assert steps.speed_up.value == pytest.approx(100 / 60)

    def test_devices_count_in_the_total_not_in_the_wall_clock(self):
        base = History([Point([100], [2.0], [100.0])], devices=4)
        points = [Point([50, 50], [1.0], [100.0, 60.0])]
        for devices, total in ((1, 40), (2, 80)):
            found = account(base, History(points, devices), RULE, "seconds")
            assert found.model["best"].ntc.value == pytest.approx(total)
            assert found.model["best"].nwct.value == 100
            steps = account(base, History(points, devices), RULE, "iterations")
            assert steps.model["best"].ntc.value == 100

    def test_what_experts_share_is_spent_once_and_before_them(self):
        base = history([1.0], [100])
        points = [Point([10, 30], [1.0], [5.0, 15.0])]
        ours = History(points, shared={"iterations": 20, "seconds": 7.0})
        assert costs(ours, base, "iterations").tolist() == [[60, 50]]
        base = History([Point([100], [1.0], [50.0])])
        assert costs(ours, base, "seconds").tolist() == [[54, 44]]

    def test_nothing_found_is_none(self):
        found = account(history([3, 2], [1, 2]), history([4, 3], [1, 2]), RULE, "iterations")
        for missing in (found.model["converged"], found.model["equivalent"]):
            assert missing.point is None and missing.ntc.value is missing.nwct.value is None
        assert found.speed_up.value is found.saving.value is found.saving_wall.value is None
        assert found.model["best"].point == 1


class TestSpread:
    def test_a_shift_that_all_points_share_moves_nothing(self):
        seeds = (-0.4, 0.0, 0.4)
        baseline = history([5, 4, 3, 2], [10, 20, 30, 40], seeds)
        model = history([4, 3, 1.9, 1], [10, 20, 30, 40], seeds)
        found = account(baseline, model, RULE, "iterations")
        for figure in (found.speed_up, found.saving, found.saving_wall):
            assert figure.low == figure.high == figure.value and figure.found == 1
        assert found.seed_std == pytest.approx(0.4)

    def test_equals_all_draws_of_two_seeds(self):
        # Seed 0 alone reaches the target at point 1, seed 1 alone never, both together at point 2.
        baseline = history([2.0], [100], (0.0, 0.0))
        curves = [(3.0, 3.0), (1.0, 3.1), (1.0, 2.9), (1.0, 2.9)]
        model = History([Point([10 * (i + 1)], pair) for i, pair in enumerate(curves)])
        found = account(baseline, model, RULE, "iterations").model["equivalent"]
        assert found.point == 2 and found.ntc.value == 30
        assert (found.ntc.low, found.ntc.high) == (20, 30)
        assert found.ntc.found == pytest.approx(3 / 4, abs=0.05)

    def test_five_and_ninety_five_per_cent_of_a_normal_mean(self):
        # The curve falls by 1 a point: the point that is found moves as the mean of the seeds does.
        shifts = 10 * np.random.default_rng(0).standard_normal(16)
        model = history(50.5 - np.arange(100), np.arange(1, 101), shifts - shifts.mean())
        baseline = history([0.0], [100], np.zeros(16))
        figure = account(baseline, model, RULE, "iterations").model["equivalent"].ntc
        assert figure.value == 52 and figure.found == 1
        reach = 1.645 * shifts.std() / 4
        assert (figure.low, figure.high) == pytest.approx((52 - reach, 52 + reach), abs=1)

    def test_never_found_in_any_draw(self):
        model, baseline = history([3.0], [9], (0, 1)), history([2.0], [9], (0, 1))
        figure = account(baseline, model, RULE, "iterations").speed_up
        assert figure.value is figure.low is figure.high is None and figure.found == 0

    def test_the_same_twice(self):
        generator = np.random.default_rng(1)
        curves = generator.normal(3, 0.2, (2, 9, 3)) - np.linspace(0, 1, 9)[:, None]
        base, model = (
            History([Point([i + 1], row) for i, row in enumerate(rows)]) for rows in curves
        )
        first, second = (account(base, model, RULE, "iterations") for _ in range(2))
        assert first == second
        assert first.model["best"].nwct.low <= first.model["best"].nwct.high


class TestFaults:
    def test_other_seeds_at_a_point(self):
        with pytest.raises(ValueError, match="from 1 to 2 distances"):
            History([Point([1], [3.0]), Point([2], [3.0, 2.0])])

    def test_other_seeds_of_the_baseline(self):
        with pytest.raises(ValueError, match="1 sampling seeds of the model and 2 of the base"):
            account(history([1], [1], (0, 1)), history([1], [1]), RULE, "iterations")

    @pytest.mark.parametrize("totals", [[], [0, 5], [5, 4]])
    def test_points_in_no_order(self, totals):
        with pytest.raises(ValueError, match="positive totals in their order"):
            history([1.0] * len(totals), totals)

    def test_a_distance_that_is_not_finite(self):
        with pytest.raises(ValueError, match="after 2 iterations is not finite"):
            history([1.0, float("nan")], [1, 2])

    def test_seconds_that_nobody_took(self):
        with pytest.raises(ValueError, match="point 0 has no seconds"):
            account(history([1], [1]), history([1], [1]), RULE, "seconds")
