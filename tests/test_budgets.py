"""Budgets: shares that are fixed, and decisions that can be replayed."""

import copy
import json
import math
import random

import pytest

from expertdiff.budgets import Adaptive, Explicit, Proportional, as_budget
from expertdiff.describe import build, describe
from expertdiff.diffusion.partition import Partition

PAPER = Partition([0, 0.1, 0.8, 1])
TOTAL = 1000
SETTINGS = {"data": "digits", "seed": 0}


def train(rule, losses, distance=None, partition=PAPER, iterations=TOTAL):
    """The ledger of a study whose losses and distance are functions of the steps."""
    ledger = [rule.start(partition, iterations, SETTINGS)]
    while (steps := ledger[-1]["until"]) != ledger[-1]["budgets"]:
        seen = {"losses": [loss(n) for loss, n in zip(losses, steps)]}
        if (base := ledger[-1]["check"]) is not None:
            seen["distance"] = distance(base)
            alone = [[*base[:e], n, *base[e + 1 :]] for e, n in enumerate(steps)]
            seen["advanced"] = [distance(mix) for mix in alone]
        ledger.append(rule.next(ledger, seen))
    return ledger


def replayed(rule, ledger, settings=SETTINGS, partition=PAPER, iterations=TOTAL):
    """As after a restart: the ledger comes from a file."""
    rule.replay(json.loads(json.dumps(ledger)), rule.start(partition, iterations, settings))


def falling(speed, floor=1.0):
    """A loss from floor + 1 down to `floor`."""
    return lambda steps: floor + math.exp(-steps * speed)


def flat(steps):
    return 0.5


class TestFixed:
    def test_what_a_study_may_be_given(self):
        assert isinstance(as_budget(None), Proportional)
        assert as_budget([1, 2]).allot(Partition([0, 0.5, 1]), 3) == [1, 2]
        assert as_budget(rule := Adaptive()) is rule

    def test_each_is_built_again_from_its_description(self):
        for rule in (Proportional(), Explicit([1, 2]), Adaptive(8, check_points=(3, 6))):
            plain = json.loads(json.dumps(describe(rule)))
            assert describe(build(plain, type(rule))) == plain

    @pytest.mark.parametrize("edges", [[0, 0.1, 0.8, 1], [k / 7 for k in range(7)] + [1]])
    def test_proportional_sums_to_the_total(self, edges):
        partition = Partition(edges)
        for rule in (Proportional(), Adaptive()):
            for iterations in (1000, 1001, 500_000):
                budgets = rule.allot(partition, iterations)
                assert sum(budgets) == iterations
                for budget, interval in zip(budgets, partition.intervals()):
                    assert abs(budget - (interval.hi - interval.lo) * iterations) <= 1

    def test_paper_budget(self):
        assert Proportional().allot(PAPER, 500_000) == [50_000, 350_000, 100_000]

    def test_too_few_iterations(self):
        with pytest.raises(ValueError, match=r"leave \[0, 3, 1\]"):
            Proportional().allot(PAPER, 4)
        with pytest.raises(ValueError, match=r"leave \[5, 35, 10\] steps, too few for 10 rounds"):
            Adaptive().allot(PAPER, 50)

    @pytest.mark.parametrize(
        "steps, why",
        [
            ([8, 8], "names 2 experts"),
            ([8, 8, 8], "at most 16, what study.iterations leaves"),
            ([0, 8, 8], "must be positive"),
            ([], "names 0 experts"),
        ],
    )
    def test_explicit_that_does_not_fit(self, steps, why):
        with pytest.raises(ValueError, match=why):
            Explicit(steps).allot(PAPER, 16)

    def test_explicit(self):
        assert Explicit((5, 4, 1)).allot(PAPER, 16) == [5, 4, 1]


class TestDecisions:
    def test_nothing_flat_trains_what_is_proportional(self):
        ledger = train(Adaptive(), [lambda n: 1 / n] * 3)
        assert ledger[-1]["until"] == [100, 700, 200] and len(ledger) == 10
        assert not any(entry.get("stopped") or any(entry.get("given", [])) for entry in ledger)

    def test_each_round_trains_an_equal_part(self):
        until = [entry["until"] for entry in train(Adaptive(), [lambda n: 1 / n] * 3)]
        assert until == [[10 * r, 70 * r, 20 * r] for r in range(1, 11)]

    def test_a_flat_expert_is_stopped_as_soon_as_its_rounds_allow(self):
        for patience in (1, 2, 4):
            ledger = train(Adaptive(patience=patience), [falling(0.01), flat, falling(0.01)])
            stops = {entry["round"]: entry["stopped"] for entry in ledger if entry.get("stopped")}
            assert stops == {patience + 1: [1]}
            assert ledger[-1]["until"][1] == 70 * (patience + 1)

    def test_what_it_leaves_goes_to_the_steepest(self):
        ledger = train(Adaptive(), [falling(0.002), flat, falling(0.004, floor=0.1)])
        assert [entry["given"] for entry in ledger[1:]] == [[0, 0, 0]] * 2 + [[0, 0, 70]] * 7
        assert ledger[-1]["until"] == [100, 210, 690]

    def test_steepest_is_counted_by_iteration_not_by_round(self):
        # Both fall alike a round, but the last needs twice the steps for it.
        losses = [lambda n: 0.99 ** (n / 10), flat, lambda n: 0.99 ** (n / 20)]
        entry = train(Adaptive(), losses)[3]
        assert entry["stopped"] == [1] and entry["given"] == [70, 0, 0]

    def test_falls_are_relative_and_of_the_whole_study(self):
        # From round 1 to 3 the first trains 20 of 1000 steps and loses a tenth.
        entry = train(Adaptive(), [lambda n: 1.0 if n <= 10 else 0.9, flat, flat])[3]
        assert entry["falls"]["loss"] == pytest.approx([0.1 / 0.02, 0, 0])
        scaled = train(Adaptive(), [lambda n: 1e-4 if n <= 10 else 0.9e-4, flat, flat])[3]
        assert scaled["falls"]["loss"] == pytest.approx(entry["falls"]["loss"])

    def test_a_rising_loss_is_stopped(self):
        ledger = train(Adaptive(), [falling(0.01), lambda n: 1 + n, falling(0.01)])
        assert ledger[3]["stopped"] == [1]

    def test_the_slowest_may_change_from_round_to_round(self):
        losses = [lambda n: 1 + 1 / n, flat, lambda n: 1.5 - n / 2000]
        given = [entry["given"] for entry in train(Adaptive(), losses)[3:]]
        assert given[0] == [70, 0, 0] and given[-1] == [0, 0, 70]

    def test_all_flat_saves_the_rest(self):
        ledger = train(Adaptive(), [flat] * 3)
        assert len(ledger) == 4 and ledger[-1]["stopped"] == [0, 1, 2]
        assert ledger[-1]["until"] == ledger[-1]["budgets"] == [30, 210, 60]

    def test_a_flat_loss_goes_on_while_its_distance_falls(self):
        rule = Adaptive(check_points=[2, 5])
        losses = [flat, falling(0.01), falling(0.01)]
        ledger = train(rule, losses, lambda steps: 10 + math.exp(-steps[0] / 20))
        assert not any(entry.get("stopped") for entry in ledger[:5])
        assert ledger[2]["falls"]["distance"][1:] == [0, 0]
        still = train(rule, losses, lambda steps: 10.0)
        assert still[3]["stopped"] == [0]

    def test_distance_is_preferred_to_loss(self):
        losses = [falling(0.02), flat, falling(0.002)]
        assert train(Adaptive(), losses)[3]["given"] == [70, 0, 0]
        rule = Adaptive(check_points=[2])
        ledger = train(rule, losses, lambda steps: 10 - steps[2] / 1000)
        assert ledger[3]["given"] == [0, 0, 70]

    def test_distances_start_from_the_last_check(self):
        ledger = train(Adaptive(check_points=[2, 5, 6]), [falling(0.01)] * 3, lambda n: 9.0)
        # An entry tells what is due after the round to come; the first starts from round 1.
        checks = {entry["round"] + 1: entry["check"] for entry in ledger if entry["check"]}
        assert checks == {2: [10, 70, 20], 5: [20, 140, 40], 6: [50, 350, 100]}
        measured = [entry["round"] for entry in ledger[1:] if "distance" in entry["inputs"]]
        assert measured == [2, 5, 6]

    def test_distance_falls_by_the_experts_own_steps(self):
        rule, losses = Adaptive(check_points=[3]), [falling(0.01)] * 3
        ledger = train(rule, losses, lambda n: 10 - 0.01 * n[0] - 0.01 * n[2])
        base, fall = 10 - 0.1 - 0.2, 0.01 * TOTAL
        assert ledger[3]["falls"]["distance"] == pytest.approx([fall / base, 0, fall / base])


def noisy(seed):
    """A rule, a partition, a total and losses and distances without any order."""
    draw = random.Random(seed)
    experts, rounds = draw.randint(1, 6), draw.randint(4, 12)
    inner = sorted(draw.sample(range(1, 20), experts - 1))
    partition = Partition([0, *(edge / 20 for edge in inner), 1])
    checks = sorted(draw.sample(range(2, rounds), draw.randint(0, rounds - 2)))
    rule = Adaptive(rounds, checks, draw.randint(1, rounds - 2), draw.random(), draw.random())
    losses = [lambda n: draw.uniform(0.5, 1.0) / (1 + n / 500)] * experts
    return rule, losses, lambda n: draw.uniform(9, 10), partition, draw.randint(400, 5000)


class TestAnyHistory:
    @pytest.mark.parametrize("seed", range(60))
    def test_holds_for(self, seed):
        rule, losses, distance, partition, iterations = noisy(seed)
        ledger = train(rule, losses, distance, partition, iterations)
        everyone, stopped, before = set(range(len(partition))), set(), [0] * len(partition)
        for entry in ledger:
            assert sum(entry["budgets"]) <= iterations
            assert all(step <= budget for step, budget in zip(entry["until"], entry["budgets"]))
            assert stopped.isdisjoint(entry.get("stopped", []))
            stopped.update(entry.get("stopped", []))
            grown = {e for e in everyone if entry["until"][e] > before[e]}
            assert grown == everyone - stopped  # the stopped rest, the others lose no round
            assert all(entry["until"][e] == entry["budgets"][e] for e in stopped)
            before = entry["until"]
        assert len(ledger) <= rule.rounds
        if stopped != everyone:
            assert sum(ledger[-1]["until"]) == iterations  # nothing is lost
        replayed(rule, ledger, partition=partition, iterations=iterations)

    def test_some_of_these_stop_and_some_give(self):
        ledgers = [train(*noisy(seed)) for seed in range(60)]
        entries = [entry for ledger in ledgers for entry in ledger[1:]]
        assert sum(bool(entry["stopped"]) for entry in entries) > 20
        assert sum(any(entry["given"]) for entry in entries) > 20


class TestReplay:
    RULE = Adaptive(check_points=[2, 6])

    @pytest.fixture
    def ledger(self):
        losses = [falling(0.01), flat, falling(0.004)]
        return train(self.RULE, losses, lambda n: 5 + math.exp(-n[2] / 100))

    def test_the_same_twice(self, ledger):
        losses = [falling(0.01), flat, falling(0.004)]
        assert ledger == train(self.RULE, losses, lambda n: 5 + math.exp(-n[2] / 100))
        kept = copy.deepcopy(ledger)
        replayed(self.RULE, ledger)
        self.RULE.replay(ledger, ledger[0])
        assert ledger == kept  # nothing is changed in place

    def test_a_part_of_it(self, ledger):
        for n in range(1, len(ledger)):
            replayed(self.RULE, ledger[:n])

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda entry: entry["inputs"]["losses"].__setitem__(0, 0.9),
            lambda entry: entry["inputs"].__setitem__("distance", 9.0),
            lambda entry: entry["inputs"]["advanced"].__setitem__(2, 4.0),
            lambda entry: entry["stopped"].append(0),
            lambda entry: entry["given"].__setitem__(0, 5),
            lambda entry: entry["budgets"].__setitem__(0, 500),
            lambda entry: entry["until"].__setitem__(0, 61),
            lambda entry: entry["falls"]["loss"].__setitem__(0, 0.0),
            lambda entry: entry.__setitem__("check", [1, 1, 1]),
            lambda entry: entry.__setitem__("round", 7),
            lambda entry: entry.__setitem__("note", "mine"),
            lambda entry: entry.pop("given"),
        ],
    )
    def test_a_tampered_entry_is_refused(self, ledger, tamper):
        tamper(ledger[6])
        with pytest.raises(ValueError, match="after round 6 does not follow from the ledger"):
            replayed(self.RULE, ledger)

    def test_a_missing_round_is_refused(self, ledger):
        del ledger[4]
        with pytest.raises(ValueError, match="after round"):
            replayed(self.RULE, ledger)

    def test_inputs_that_are_gone(self, ledger):
        del ledger[3]["inputs"]
        with pytest.raises(ValueError, match="after round 3 a decision needs losses, not nothing"):
            replayed(self.RULE, ledger)

    @pytest.mark.parametrize("content", [[], {}, None, "text", [None], [[1]]])
    def test_a_file_that_is_no_ledger(self, content):
        with pytest.raises(ValueError, match="holds no decisions: restore the file"):
            replayed(self.RULE, content)

    def test_inputs_that_are_no_names_and_numbers(self, ledger):
        for inputs in ([1.0], None, "text"):
            ledger[3]["inputs"] = inputs
            with pytest.raises(ValueError, match="holds no decisions"):
                replayed(self.RULE, ledger)

    def test_an_entry_too_many(self, ledger):
        with pytest.raises(ValueError, match="nothing is left to decide"):
            replayed(self.RULE, [*ledger, ledger[-1]])

    def test_the_order_of_settings_means_nothing(self, ledger):
        replayed(self.RULE, ledger, settings=dict(reversed(SETTINGS.items())))

    @pytest.mark.parametrize(
        "change, what",
        [
            (dict(settings={"data": "digits", "seed": 1}), "settings"),
            (dict(partition=Partition([0, 0.2, 0.8, 1])), "partition"),
            (dict(iterations=2000), "iterations: 2000 != 1000"),
        ],
    )
    def test_a_ledger_of_another_study(self, ledger, change, what):
        with pytest.raises(ValueError, match="of another study") as error:
            replayed(self.RULE, ledger, **change)
        assert what in str(error.value)

    def test_a_ledger_of_another_rule(self, ledger):
        with pytest.raises(ValueError, match="rule.loss_fall: 0.5 != 0.02"):
            replayed(Adaptive(check_points=[2, 6], loss_fall=0.5), ledger)


class TestFaults:
    @pytest.mark.parametrize("checks", [[1], [10], [4, 2], [3, 3], [2, 0]])
    def test_check_points_that_are_no_rounds(self, checks):
        with pytest.raises(ValueError, match="must be increasing rounds from 2 to 9"):
            Adaptive(check_points=checks)

    @pytest.mark.parametrize("rounds, patience", [(3, 2), (10, 0), (10, 9), (1, 1)])
    def test_rounds_that_decide_nothing(self, rounds, patience):
        with pytest.raises(ValueError, match="decide nothing"):
            Adaptive(rounds, patience=patience)

    @pytest.mark.parametrize(
        "losses", [[1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, float("nan")], 1.0, [1.0, 1.0, None]]
    )
    def test_losses_that_cannot_be_used(self, losses):
        rule = Adaptive()
        with pytest.raises(ValueError, match="after round 1 cannot be used"):
            rule.next([rule.start(PAPER, TOTAL, SETTINGS)], {"losses": losses})

    def test_distances_are_asked_for_at_check_points_only(self):
        rule, seen = Adaptive(check_points=[2]), {"losses": [1.0] * 3}
        ledger = [rule.start(PAPER, TOTAL, SETTINGS)]
        with pytest.raises(ValueError, match="needs losses, not losses, distance"):
            rule.next(ledger, seen | {"distance": 1.0})
        ledger.append(rule.next(ledger, seen))
        with pytest.raises(ValueError, match="needs losses, distance, advanced, not losses"):
            rule.next(ledger, seen)
