"""Processes in continuous time, what trains and samples on them, and expert borders."""

import math

import pytest
import torch
from scipy.stats import kstest

from expertdiff.diffusion.denoiser import Denoiser, Eps, NetworkDenoiser, Prediction, V
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import (
    VESDE,
    VPSDE,
    CosineBetas,
    DiscreteVP,
    SubVPSDE,
    expand,
)
from expertdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Heun, SampleNoise
from expertdiff.diffusion.timesteps import LossSecondMoment, SoftTruncation, Step, Uniform
from expertdiff.experts.routed import RoutedExperts
from expertdiff.seeds import generator

PROCESSES = [VPSDE(), SubVPSDE(), VESDE()]
CHAIN = DiscreteVP(CosineBetas(), 40)
ST = [0, 0.2, 0.6, 1]
"""MDM's intervals for Soft-Truncation."""


def each(values):
    return pytest.mark.parametrize("process", values, ids=lambda p: type(p).__name__)


class Exact(Denoiser):
    """Of data N(mean, std^2)."""

    def __init__(self, process, mean=0.3, std=0.2):
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, x_t, t, y=None):
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x0 = self.mean + gain * (x_t - alpha * self.mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


class TestProcesses:
    @each(PROCESSES)
    def test_log_snr_and_its_inverse(self, process):
        t = torch.logspace(-5, 0, 200, dtype=torch.float64)
        alpha, sigma = process.alpha_sigma(t)
        log_snr = process.log_snr(t)
        assert torch.allclose(log_snr, 2 * (alpha.log() - sigma.log()), rtol=1e-9)
        assert torch.allclose(process.at_log_snr(log_snr), t, rtol=1e-10)
        assert (log_snr.diff() < 0).all()

    def test_closed_forms_at_the_ends(self):
        one = torch.ones(1, dtype=torch.float64)
        alpha, sigma = VPSDE().alpha_sigma(one)
        assert alpha.item() == pytest.approx(math.exp(-10.05 / 2))
        assert sigma.item() == pytest.approx(math.sqrt(1 - math.exp(-10.05)))
        # In float32 1 - exp(-B) would be 7 % off here.
        _, sigma = VPSDE().alpha_sigma(1e-5 * one)
        assert sigma.item() ** 2 == pytest.approx(0.1 * 1e-5 + 19.9e-10 / 2, rel=1e-6)
        assert VESDE().alpha_sigma(one)[1].item() == pytest.approx(50)
        assert SubVPSDE().alpha_sigma(one)[1].item() == pytest.approx(1 - math.exp(-10.05))

    @each(PROCESSES)
    def test_density_of_likelihood_training_is_the_slope_of_log_snr(self, process):
        """g^2 / sigma^2 from the equations themselves (arXiv 2011.13456, appendix B)."""
        t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
        beta = 0.1 + 19.9 * t
        alpha, sigma = process.alpha_sigma(t)
        g2 = {
            VPSDE: beta,
            SubVPSDE: beta * (1 - alpha**4),
            VESDE: 2 * math.log(5000) * sigma**2,
        }[type(process)]
        h = 1e-6
        slope = (process.log_snr(t - h) - process.log_snr(t + h)) / (2 * h)
        assert torch.allclose(slope, g2 / sigma**2, rtol=1e-5)

    @each(PROCESSES)
    def test_times_stay_inside_their_interval(self, process):
        partition = Partition(ST)
        u = torch.cat([torch.zeros(1), torch.rand(5000), torch.full((1,), 1 - 2**-24)])
        for i, interval in enumerate(partition.intervals()):
            assert (partition.index(process.progress(process.times(u, interval))) == i).all()
        assert process.times(torch.zeros(1), Interval()).item() == process.T_MIN

    def test_fifty_steps_call_the_experts_of_soft_truncation(self):
        visited = VPSDE().visited(50)
        assert Partition(ST).index(visited).bincount().tolist() == [10, 20, 20]
        assert visited[0] == 1 and visited[-1] == pytest.approx(1e-3)
        assert torch.equal(VPSDE().visited("ddim50"), visited)
        with pytest.raises(ValueError, match="has no steps of its own"):
            VPSDE().visited(None)

    def test_networks_are_told_999_t(self):
        class Told(torch.nn.Module):
            def forward(self, x, t, y=None):
                self.t = t
                return x

        told = Told()
        NetworkDenoiser(told, VPSDE(), Eps())(torch.zeros(1, 2), torch.tensor([0.5]))
        assert told.t.tolist() == [499.5] and told.t.dtype == torch.float32

    def test_refusals(self):
        with pytest.raises(ValueError, match="betas 0 to 1"):
            VPSDE(0, 1)
        with pytest.raises(ValueError, match="sigmas 1 to 0.5"):
            VESDE(1, 0.5)
        with pytest.raises(ValueError, match="prediction V needs"):
            NetworkDenoiser(torch.nn.Identity(), VESDE(), V())


class TestSamplers:
    @each([*PROCESSES, DiscreteVP(CosineBetas(), 400)])
    @pytest.mark.parametrize("sampler", [DDIM, DDPM, DPMSolverPP2M, Heun], ids=lambda s: s.__name__)
    def test_gaussian_data_come_back(self, process, sampler):
        noise = SampleNoise(0, range(20_000), (1,), "cpu")
        x = sampler(400, clip=False)(Exact(process), noise)
        assert x.mean().item() == pytest.approx(0.3, abs=0.01)
        assert x.std().item() == pytest.approx(0.2, rel=0.04)

    def test_heun_is_of_second_order(self):
        process, noise = VPSDE(), SampleNoise(0, range(50), (1,), "cpu")
        truth = Heun(2000, clip=False)(Exact(process), noise)

        def error(sampler, steps):
            return (sampler(steps, clip=False)(Exact(process), noise) - truth).abs().mean()

        assert error(Heun, 40) < error(DDIM, 79) / 3  # the same number of calls
        assert len(Heun(40).calls(process)) == 79

    @pytest.mark.parametrize("steps", [18, 50])
    def test_heun_bears_errors_where_a_cosine_chain_jumps(self, steps):
        """sigma / alpha falls from 20,000 to tens in the first step."""

        class Off(Exact):
            def forward(self, x_t, t, y=None):
                exact = super().forward(x_t, t, y)
                alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(t))
                eps = exact.eps + 0.01 * torch.sin(7 * x_t + t[0])
                return Prediction((x_t - sigma * eps) / alpha, eps)

        noise = SampleNoise(0, range(5000), (1,), "cpu")
        x = Heun(steps)(Off(DiscreteVP(CosineBetas())), noise)
        assert x.mean().item() == pytest.approx(0.3, abs=0.02)
        assert x.std().item() == pytest.approx(0.2, rel=0.1)

    def test_heun_asks_the_owner_of_each_t(self):
        asked = []

        class Asked(Exact):
            def forward(self, x_t, t, y=None):
                asked.append((self.mean, t[0].item()))
                return super().forward(x_t, t, y)

        process, partition = VPSDE(), Partition(ST)
        routed = RoutedExperts([Asked(process, mean) for mean in (0, 1, 2)], partition)
        Heun(10, clip=False)(routed, SampleNoise(0, range(2), (1,), "cpu"))
        t = torch.tensor([t for _, t in asked], dtype=torch.float64)
        assert [mean for mean, _ in asked] == partition.index(t).tolist()
        assert t.tolist() == Heun(10).calls(process).tolist()

    @pytest.mark.parametrize("restart", [False, True])
    def test_multistep_solver_at_borders(self, restart):
        """With restarts, experts of different data act as if each ran its interval alone."""
        process, noise = VPSDE(), SampleNoise(0, range(4), (1,), "cpu")
        experts = [Exact(process, mean) for mean in (0.5, -0.5)]
        routed = RoutedExperts(experts, Partition([0, 0.5, 1]))
        sampler = DPMSolverPP2M(20, clip=False, restart=restart)
        states = list(sampler.trajectory(routed, noise))
        border = next(s for s in states if 0 <= s.t <= 0.5)
        alone = list(sampler.trajectory(experts[0], noise, start=border._replace(before=None)))
        assert torch.equal(alone[-1].x_t, states[-1].x_t) == restart

    @pytest.mark.parametrize(
        "sampler", [DDIM(20, eta=0.5), DPMSolverPP2M(20), Heun(20)], ids=lambda s: type(s).__name__
    )
    @each([VPSDE(), CHAIN])
    def test_any_state_goes_on_to_the_same_samples(self, sampler, process):
        noise = SampleNoise(3, range(4), (1, 2, 2), "cpu")
        *states, end = sampler.trajectory(Exact(process), noise)
        for state in states[::7]:
            (*_, again) = sampler.trajectory(Exact(process), noise, start=state)
            assert torch.equal(again.x_t, end.x_t) and again.t == -1


class TestSoftTruncation:
    @pytest.mark.parametrize("k", [0.8, 1.0, 2.0])
    def test_quantile_of_the_truncation(self, k):
        sampler, u = SoftTruncation(k), torch.linspace(0, 1, 101, dtype=torch.float64)
        m = sampler.quantile(u, 1e-5)
        assert m[0].item() == pytest.approx(1e-5) and m[-1].item() == pytest.approx(1)
        assert torch.allclose(sampler.below(m, 1e-5), u, atol=1e-12)
        # against the integral of m^-k
        grid = torch.logspace(-5, 0, 200_001, dtype=torch.float64)
        mass = torch.cumulative_trapezoid(grid**-k, grid)
        mass = mass / mass[-1]
        assert torch.allclose(sampler.below(grid[1:], 1e-5), mass, atol=1e-6)

    def draw(self, n, interval, step, k=1.0, process=None, rank=0):
        g, shared = generator("cpu", "t", step, rank), generator("cpu", "m", step)
        return SoftTruncation(k).sample(n, interval, g, process or VPSDE(), Step(shared))

    def test_a_step_has_one_truncation_on_all_ranks(self):
        for step in range(20):
            (a, weight), (b, other) = (self.draw(50_000, Interval(), step, rank=r) for r in (0, 1))
            assert weight.unique().numel() == 1 and torch.equal(weight, other)
            assert not torch.equal(a, b)
            # Both reach down to the m of the step: its weight says where that is.
            lowest = VPSDE().at_log_snr(VPSDE().log_snr(torch.ones(1)) + 2 * weight[:1].double())
            assert a.min() >= lowest * (1 - 1e-5) and b.min() >= lowest * (1 - 1e-5)

    @each(PROCESSES)
    def test_t_follows_its_density(self, process):
        t, weight = self.draw(4000, Interval(0.2, 0.6), 1, process=process)
        ends = process.log_snr(torch.tensor([t.min(), 0.6], dtype=torch.float64))
        uniform = (ends[0] - process.log_snr(t)) / (ends[0] - ends[1])
        assert kstest(uniform.numpy(), "uniform").pvalue > 1e-3
        assert (t > 0.2).all() and (t <= 0.6).all()

    def test_experts_add_up_to_the_single_model(self):
        """The expected weight of each t is F(t) g^2 / sigma^2, whoever draws it."""
        process, steps, edges = (
            VPSDE(),
            4000,
            torch.tensor([1e-5, 1e-3, 0.05, 0.2, 0.4, 0.6, 0.8, 1]),
        )
        histograms = []
        for intervals in ([Interval()], Partition(ST).intervals()):
            total = torch.zeros(len(edges) - 1, dtype=torch.float64)
            for interval in intervals:
                draws = [self.draw(16, interval, step) for step in range(steps)]
                t, weight = (torch.cat(parts) for parts in zip(*draws))
                total += torch.histogram(t.float(), edges, weight=weight).hist.double()
            histograms.append(total / (16 * steps))
        assert torch.allclose(*histograms, rtol=0.05)
        grid = torch.logspace(-5, 0, 20_001, dtype=torch.float64)
        slope = -process.log_snr(grid).diff() / 2 * SoftTruncation().below(grid[1:], 1e-5)
        truth = torch.stack(
            [slope[(grid[1:] > a) & (grid[1:] <= b)].sum() for a, b in zip(edges, edges[1:])]
        )
        assert torch.allclose(histograms[0], truth, rtol=0.05)

    def test_truncation_acts_mainly_on_the_clean_expert(self):
        """At k = 1 m lies above C with probability .14, above B .044."""
        below = SoftTruncation().below(torch.tensor([0.2, 0.6], dtype=torch.float64), 1e-5)
        assert (1 - below).tolist() == pytest.approx([0.14, 0.044], abs=1e-3)

    def test_refusals(self):
        with pytest.raises(ValueError, match="continuous time, not DiscreteVP"):
            SoftTruncation().prepare(CHAIN, Interval(), Partition([0, 1]))
        with pytest.raises(ValueError, match="k 0 must"):
            SoftTruncation(0)


class TestLossSecondMoment:
    INTERVAL = Interval(0.25, 0.5)  # t 10 to 19

    def sampler(self, **options):
        sampler = LossSecondMoment(**options)
        sampler.prepare(CHAIN, self.INTERVAL, Partition([0, 1]))
        return sampler

    def draw(self, sampler, n=20_000):
        g = generator("cpu", "draw")
        return sampler.sample(n, self.INTERVAL, g, CHAIN, g)

    def test_uniform_until_the_last_t_is_full(self):
        sampler = self.sampler()
        t = torch.arange(10, 20)
        for _ in range(9):
            sampler.update(t, t.double())
        sampler.update(t[:-1], t[:-1].double())
        assert (self.draw(sampler)[1] == 1).all()
        sampler.update(t[-1:], t[-1:].double())
        t, weight = self.draw(sampler)
        p = t.bincount()[10:] / len(t)
        expected = 0.999 * torch.arange(10, 20) / torch.arange(10, 20).sum() + 0.001 / 10
        assert torch.allclose(p, expected.float(), atol=0.01)
        assert torch.allclose(weight, (1 / (10 * expected[t - 10])).float())

    def test_the_weight_makes_it_unbiased(self):
        sampler = self.sampler()
        t = torch.arange(10, 20).repeat(10)
        sampler.update(t, (t.double() - 9) ** 2)
        t, weight = self.draw(sampler, 200_000)
        f = torch.sin(t.double())
        assert (weight * f).mean().item() == pytest.approx(
            torch.sin(torch.arange(10, 20).double()).mean().item(), abs=0.01
        )

    def test_a_batch_is_told_as_one_after_another(self):
        """Against a list of the last three for each t, with many repeats in a batch."""
        sampler, rings = self.sampler(history=3), [[] for _ in range(10)]
        g = torch.Generator().manual_seed(0)
        for _ in range(30):
            t = torch.randint(10, 20, (25,), generator=g)
            loss = torch.rand(25, generator=g)
            sampler.update(t, loss)
            for i, value in zip(t.tolist(), loss.tolist()):
                rings[i - 10] = [*rings[i - 10], value][-3:]
        for row, ring in zip(sampler.losses.tolist(), rings):
            assert sorted(row) == pytest.approx(sorted(ring))

    def test_what_was_learnt_is_state(self):
        a, b = self.sampler(), self.sampler()
        a.update(torch.arange(10, 20).repeat(10), torch.rand(100))
        b.load_state_dict(a.state_dict())
        assert torch.equal(self.draw(a)[0], self.draw(b)[0])

    def test_refusals(self):
        with pytest.raises(ValueError, match="needs a process with timesteps, not VPSDE"):
            LossSecondMoment().prepare(VPSDE(), Interval(), Partition([0, 1]))
        with pytest.raises(ValueError, match="history 0"):
            LossSecondMoment(0)


def test_uniform_draws_continuous_t():
    g = generator("cpu", "u")
    t, weight = Uniform().sample(10_000, Interval(0.2, 0.6), g, VPSDE(), g)
    assert kstest(((t - 0.2) / 0.4).numpy(), "uniform").pvalue > 1e-3 and (weight == 1).all()
