"""The noise process, losses, weightings and samplers against closed forms and diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from expertdiff.diffusion.denoiser import X0, Denoiser, Eps, NetworkDenoiser, Prediction, V
from expertdiff.diffusion.objective import losses
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import (
    CosineBetas,
    DiscreteVP,
    LinearBetas,
    QuadraticBetas,
    expand,
    spaced,
)
from expertdiff.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, SampleNoise
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import P2, MinSNR, Simple
from expertdiff.experts.routed import RoutedExperts
from expertdiff.seeds import generator

COSINE = DiscreteVP(CosineBetas())
KINDS = [Eps(), X0(), V()]
DIFFUSERS = {"Eps": "epsilon", "X0": "sample", "V": "v_prediction"}
SCHEDULES = {
    "linear": (LinearBetas(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "cosine": (CosineBetas(), {"beta_schedule": "squaredcos_cap_v2"}),
    "quadratic": (
        QuadraticBetas(),
        {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
}


class Fake(torch.nn.Module):
    """A deterministic stand-in for a network, nonlinear in x and t."""

    num_classes = None

    def __init__(self, learned=False):
        super().__init__()
        self.learned = learned

    def forward(self, x, t, y=None):
        out = torch.sin(1.3 * x + expand(t.double(), x) / 300)
        return torch.cat([out, torch.cos(x)], 1) if self.learned else out


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_diffusers(name):
    betas, arguments = SCHEDULES[name]
    theirs = DDPMScheduler(**arguments).alphas_cumprod.double()
    ours = DiscreteVP(betas).alpha_bar
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_schedule_known_values():
    # mdm.md 3.1, dualdiff.md 4, remix-dit.md 3.3
    assert COSINE.alpha_bar[999].item() == pytest.approx(2.43e-9, rel=2e-3)
    assert DiscreteVP(LinearBetas()).alpha_bar[999].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert DiscreteVP(LinearBetas(), T=100).alpha_bar[99].item() == pytest.approx(0.3636, abs=5e-5)
    assert DiscreteVP(QuadraticBetas(), 100).alpha_bar[99].item() == pytest.approx(0.4846, abs=5e-5)
    assert (COSINE.snr(torch.arange(1000)).diff() < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_types_invert_the_noising(kind):
    x0, eps = torch.randn(2, 6, 3, 4, 4).unbind()
    t = torch.tensor([0, 1, 100, 500, 900, 980])
    x_t = COSINE.add_noise(x0, eps, t)
    alpha, sigma = (expand(c, x0) for c in COSINE.alpha_sigma(t))
    back = kind.x0_eps(kind.target(x0, eps, alpha, sigma), x_t, alpha, sigma)
    assert torch.allclose(back[0], x0, atol=2e-4)
    # eps of an x0 network is lost where there is hardly noise
    assert torch.allclose(back[1][1:], eps[1:], atol=2e-4)


def test_score_and_gain_are_consistent():
    t = torch.tensor([3, 300, 800])
    snr = COSINE.snr(t)
    x0, eps, wrong = torch.randn(3, 3, 1, 5, 5).unbind()
    alpha, sigma = (expand(c, x0) for c in COSINE.alpha_sigma(t))
    x_t = COSINE.add_noise(x0, eps, t)
    for kind in KINDS:
        output = kind.target(x0, eps, alpha, sigma) + 0.1 * wrong
        error_x0 = (kind.x0_eps(output, x_t, alpha, sigma)[0] - x0).square().sum((1, 2, 3))
        error = (0.1 * wrong).square().sum((1, 2, 3))
        assert torch.allclose(error, kind.gain(snr).float() * error_x0, rtol=1e-2)


class TestWeighting:
    t = torch.tensor([0, 10, 500, 990])

    def test_p2_is_one_minus_alpha_bar(self):
        alpha_bar = COSINE.alpha_bar[self.t]
        assert torch.allclose(P2()(COSINE, self.t), 1 - alpha_bar, rtol=1e-12)
        assert torch.equal(P2(gamma=0.0)(COSINE, self.t), Simple()(COSINE, self.t))

    def test_p2_ranges_of_the_mdm_experts(self):
        w = P2()(COSINE, torch.arange(1000))
        ranges = [(s[0].item(), s[-1].item()) for s in (w[:100], w[100:800], w[800:])]
        assert ranges[0] == (pytest.approx(4.1e-5, rel=0.02), pytest.approx(0.028, abs=1e-3))
        assert ranges[1] == (pytest.approx(0.028, abs=1e-3), pytest.approx(0.906, abs=1e-3))
        assert ranges[2] == (pytest.approx(0.907, abs=1e-3), pytest.approx(1.0, abs=1e-6))

    @pytest.mark.parametrize("kind", KINDS)
    def test_min_snr_weighs_the_error_of_x0(self, kind):
        snr = COSINE.snr(self.t)
        on_x0 = MinSNR(5.0)(COSINE, self.t, kind) * kind.gain(snr)
        assert torch.allclose(on_x0, snr.clamp(max=5.0))


class TestPartition:
    @pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 20, 999, 1000])
    def test_every_step_has_one_owner_and_intervals_agree(self, n):
        partition = Partition([k / n for k in range(n)] + [1])
        owner = partition.index(COSINE.progress(torch.arange(1000)))
        steps = [list(interval.steps(1000)) for interval in partition.intervals()]
        assert [t for part in steps for t in part] == list(range(1000))
        assert all((owner[part] == i).all() for i, part in enumerate(steps) if part)

    def test_edges_of_mdm(self):
        partition = Partition([0, 0.1, 0.8, 1])
        steps = [i.steps(1000) for i in partition.intervals()]
        assert steps == [range(0, 100), range(100, 800), range(800, 1000)]
        t = torch.tensor([0, 99, 100, 799, 800, 999])
        assert partition.index(COSINE.progress(t)).tolist() == [0, 0, 1, 1, 2, 2]

    def test_rounded_edges_are_the_rational_ones(self):
        assert Partition([0, 0.1 + 0.2, 1]) == Partition([0, 0.3, 1])
        assert Interval(0, 0.7999999999999999).steps(1000) == range(0, 800)

    def test_edge_belongs_to_the_cleaner_expert(self):
        points = torch.tensor([1e-9, 0.25, 0.25 + 1e-12, 0.5, 1.0], dtype=torch.float64)
        assert Partition([0, 0.25, 0.5, 1]).index(points).tolist() == [0, 0, 1, 1, 2]

    @pytest.mark.parametrize(
        "edges",
        [[], [0], [0, 0.5], [0.1, 1], [0, 0.6, 0.5, 1], [0, 0.5, 0.5, 1], [0, 0.5, 1.5],
         [0, math.inf], [0, math.nan, 1], [-math.inf, 0, 1]],
    )  # fmt: skip
    def test_what_is_no_partition(self, edges):
        with pytest.raises(ValueError, match="do not partition"):
            Partition(edges)

    def test_float32_is_refused(self):
        with pytest.raises(ValueError, match="float64"):
            Partition([0, 1]).index(torch.tensor([0.5]))

    def test_uniform_stays_inside_and_covers(self):
        interval = Interval(0.1, 0.12)
        noise = generator("cpu", "test")
        t, weight = Uniform().sample(2000, interval, noise, COSINE, noise)
        assert set(t.tolist()) == set(range(100, 120))
        assert (weight == 1).all() and t.dtype == torch.int64
        with pytest.raises(ValueError, match="holds none of the 10 timesteps"):
            Uniform().sample(1, interval, noise, DiscreteVP(LinearBetas(), 10), noise)


class TestObjective:
    def batch(self, t):
        g = generator("cpu", "objective")
        x0 = torch.rand(len(t), 1, 4, 4, generator=g) * 2 - 1
        eps = torch.randn(x0.shape, generator=g)
        return x0, eps, COSINE.add_noise(x0, eps, t)

    def test_perfect_prediction(self):
        t = torch.tensor([1, 5, 100, 500, 998])
        x0, eps, _ = self.batch(t)
        mse, vb = losses(Prediction(x0, eps, -torch.ones_like(x0)), Eps(), COSINE, x0, eps, t)
        assert (mse == 0).all()
        assert vb.abs().max() < 1e-6  # v = -1 is the posterior variance

    def test_vb_is_the_textbook_kl(self):
        t = torch.tensor([1, 50, 600, 990])
        x0, eps, x_t = self.batch(t)
        denoiser = NetworkDenoiser(Fake(learned=True), COSINE, Eps())
        prediction = denoiser(x_t, t)
        ours = losses(prediction, Eps(), COSINE, x0, eps, t).vb
        beta, ab, ab_prev = COSINE.betas[t], COSINE.alpha_bar[t], COSINE.alpha_bar[t - 1]
        c0, ct = ab_prev.sqrt() * beta / (1 - ab), (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab)
        x0_hat = (x_t - expand((1 - ab).sqrt(), x0) * prediction.eps) / expand(ab.sqrt(), x0)
        means = [expand(c0, x0).double() * m.double() + expand(ct, x0) * x_t for m in (x0, x0_hat)]
        posterior = beta * (1 - ab_prev) / (1 - ab)
        f = (prediction.variance.double() + 1) / 2
        q = torch.distributions.Normal(means[0], expand(posterior.sqrt(), f))
        log_p = f * expand(beta.log(), f) + (1 - f) * expand(posterior.log(), f)
        p = torch.distributions.Normal(means[1], (0.5 * log_p).exp())
        kl = torch.distributions.kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)
        assert torch.allclose(ours.double(), kl, rtol=1e-3)

    def test_vb_at_zero_is_a_probability_of_pixel_bins(self):
        # All 256 bins of one pixel sum to one.
        from expertdiff.diffusion.objective import discretised_log_likelihood

        bins = torch.arange(256) / 127.5 - 1
        log_p = discretised_log_likelihood(bins, torch.tensor(0.3), torch.tensor(-1.0))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-3)

    def test_vb_trains_the_variance_only(self):
        t = torch.tensor([0, 1, 400])
        x0, eps, x_t = self.batch(t)
        out = torch.randn(3, 2, 4, 4, requires_grad=True)
        alpha, sigma = (expand(c, x0) for c in COSINE.alpha_sigma(t))
        mean, variance = out.chunk(2, 1)
        prediction = Prediction(*Eps().x0_eps(mean, x_t, alpha, sigma), variance)
        losses(prediction, Eps(), COSINE, x0, eps, t).vb.sum().backward()
        assert (out.grad[:, 0] == 0).all() and (out.grad[:, 1] != 0).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_mse_is_that_of_the_output(self, kind):
        t = torch.tensor([10, 300, 700])
        x0, eps, x_t = self.batch(t)
        alpha, sigma = (expand(c, x0) for c in COSINE.alpha_sigma(t))
        denoiser = NetworkDenoiser(Fake(), COSINE, kind)
        ours = losses(denoiser(x_t, t), kind, COSINE, x0, eps, t).mse
        error = Fake()(x_t, t) - kind.target(x0, eps, alpha, sigma)
        assert torch.allclose(ours, error.square().mean((1, 2, 3)), rtol=2e-3)


class TestSpacing:
    def test_of_adm(self):
        assert spaced(1000, "ddim50") == list(range(0, 1000, 20))
        fifty = spaced(1000, 50)
        assert fifty[:5] == [0, 20, 41, 61, 82] and fifty[-3:] == [958, 979, 999]
        assert len(set(fifty)) == 50
        assert spaced(1000, 250)[:4] == [0, 4, 8, 12]
        assert spaced(1000, 250)[-4:] == [987, 991, 995, 999]
        assert spaced(1000, 10)[:3] == [0, 111, 222]
        assert spaced(1000, None) == list(range(1000)) == spaced(1000, "1000")

    @pytest.mark.parametrize(
        "steps, edges, calls",
        [
            ("ddim50", [0, 0.1, 0.8, 1], [5, 35, 10]),
            (50, [0, 0.1, 0.8, 1], [5, 35, 10]),
            ("ddim50", [k / 8 for k in range(9)], [7, 6, 6, 6, 7, 6, 6, 6]),
        ],
    )
    def test_calls_of_the_mdm_experts(self, steps, edges, calls):
        t = DDIM(steps).calls(COSINE)
        assert Partition(edges).index(COSINE.progress(t)).bincount().tolist() == calls

    @pytest.mark.parametrize("steps", [0, 1001, "ddim0", "fast", "ddim", -5, "ddim999"])
    def test_errors(self, steps):
        with pytest.raises(ValueError, match=r"steps|stride"):
            spaced(1000, steps)


class GaussianDenoiser(Denoiser):
    """The exact posterior mean for data N(mean, diag(variance))."""

    def __init__(self, process, mean, variance):
        super().__init__()
        self.process, self.mean, self.variance = process, mean, variance

    def forward(self, x_t, t, y=None):
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(t))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        x0 = self.mean + gain * (x_t - alpha * self.mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)


SAMPLERS = [
    DDPM(clip=False),
    DDIM(None, clip=False),
    DDIM(None, eta=1.0, clip=False),
    DPMSolverPP2M(200, clip=False),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}-{s.steps}")
def test_exact_gaussian_denoiser_gives_the_gaussian(sampler):
    mean, variance = torch.tensor([[1.5, -0.5]]), torch.tensor([[0.25, 2.0]])
    denoiser = GaussianDenoiser(COSINE, mean, variance)

    class Noise(SampleNoise):  # 20,000 points at once: the per-sample streams are tested below
        def __call__(self, step):
            return torch.randn(20_000, 2, generator=generator("cpu", "gaussian", step))

    x = sampler(denoiser, Noise(0, [], (2,), "cpu"))
    assert torch.allclose(x.mean(0), mean[0], atol=0.03)
    assert torch.allclose(x.var(0), variance[0], rtol=0.05)
    assert abs(torch.corrcoef(x.T)[0, 1]) < 0.03


def recorded_noise(shape, steps):
    return [torch.randn(shape, generator=generator("cpu", "oracle", k)) for k in range(steps + 1)]


def run_diffusers(scheduler, n, noise, monkeypatch, network, **step_arguments):
    scheduler.set_timesteps(n)
    x, seen = noise[0], []
    for k, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(
            f"{type(scheduler).__module__}.randn_tensor", lambda *a, k=k, **b: noise[k + 1]
        )
        x = scheduler.step(network(x, t.repeat(len(x))), t, x, **step_arguments).prev_sample
        seen.append(int(t))
    return x, seen


class Recorded(SampleNoise):
    def __init__(self, noise):
        self.noise = noise

    def __call__(self, step):
        return self.noise[step]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_diffusers(kind, clip, eta, monkeypatch):
    noise = recorded_noise((2, 3, 4, 4), 50)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=DIFFUSERS[type(kind).__name__],
        clip_sample=clip,
        timestep_spacing="leading",
        set_alpha_to_one=True,
    )
    theirs, seen = run_diffusers(
        scheduler, 50, noise, monkeypatch, Fake(), eta=eta, use_clipped_model_output=clip
    )
    sampler = DDIM("ddim50", eta=eta, clip=clip)
    assert sampler.calls(COSINE).tolist() == seen
    ours = sampler(NetworkDenoiser(Fake(), COSINE, kind), Recorded(noise))
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "variance, sampler, learned",
    [
        ("fixed_small", DDPM("ddim100"), False),
        ("fixed_large", DDPM("ddim100", large_variance=True), False),
        ("learned_range", DDPM("ddim100"), True),
    ],
)
def test_ddpm_is_diffusers(variance, sampler, learned, monkeypatch):
    noise = recorded_noise((2, 3, 4, 4), 100)
    scheduler = DDPMScheduler(
        beta_schedule="linear", variance_type=variance, clip_sample=True, timestep_spacing="leading"
    )
    theirs, seen = run_diffusers(scheduler, 100, noise, monkeypatch, Fake(learned))
    assert sampler.calls(COSINE).tolist() == seen
    ours = sampler(
        NetworkDenoiser(Fake(learned), DiscreteVP(LinearBetas()), Eps()), Recorded(noise)
    )
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_dpm_solver_is_diffusers(monkeypatch):
    noise = recorded_noise((2, 3, 4, 4), 20)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
        timestep_spacing="leading",
    )
    theirs, seen = run_diffusers(scheduler, 20, noise, monkeypatch, Fake())
    sampler = DPMSolverPP2M(20, clip=False)
    process = DiscreteVP(LinearBetas())
    process.visited = lambda steps: torch.tensor(seen)
    ours = sampler(NetworkDenoiser(Fake(), process, Eps()), Recorded(noise))
    assert torch.allclose(ours, theirs, atol=1e-3)


class Linear(torch.nn.Module):
    """eps = c x."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x, t, y=None):
        return self.c * x


def test_ddim_closed_form_with_another_slope_per_expert():
    # mdm.md section 7, check 3
    partition = Partition([0, 0.1, 0.8, 1])
    slopes = [0.9, 0.5, 0.2]
    experts = [NetworkDenoiser(Linear(c), COSINE, Eps()) for c in slopes]
    routed = RoutedExperts(experts, partition)
    noise = recorded_noise((2, 1, 2, 2), 50)
    sampler = DDIM(clip=False)
    *states, end = sampler.trajectory(routed, Recorded(noise))
    assert [s.t for s in states] == list(range(980, -1, -20))
    for here, there in zip(states, [*states[1:], end]):
        ab = COSINE.alpha_bar[here.t].item()
        ab_s = COSINE.alpha_bar[there.t].item() if there.t >= 0 else 1.0
        c = slopes[0 if here.t <= 99 else 1 if here.t <= 799 else 2]
        factor = math.sqrt(ab_s / ab) * (1 - c * math.sqrt(1 - ab)) + c * math.sqrt(1 - ab_s)
        assert torch.allclose(there.x_t, factor * here.x_t, rtol=1e-4)


class TestRouted:
    partition = Partition([0, 0.1, 0.8, 1])

    def experts(self, n=3):
        return [NetworkDenoiser(Linear(i + 1.0), COSINE, Eps()) for i in range(n)]

    def test_mixed_batch_equals_each_sample_alone(self):
        routed = RoutedExperts(self.experts(), self.partition)
        t = torch.tensor([999, 0, 100, 99, 800, 799, 5])
        x = torch.randn(7, 1, 2, 2)
        together = routed(x, t)
        assert torch.equal(together.eps, expand(torch.tensor([3, 1, 2, 1, 3, 2, 1]), x) * x)
        for i in range(7):
            alone = routed(x[i : i + 1], t[i : i + 1])
            assert torch.equal(alone.x0[0], together.x0[i])

    def test_copies_of_one_network_sample_bit_equal(self):
        alone = NetworkDenoiser(Fake(learned=True), COSINE, Eps())
        routed = RoutedExperts([alone] * 3, self.partition)
        noise = SampleNoise(3, range(4), (1, 4, 4), "cpu")
        for sampler in (DDIM(), DDPM(20), DPMSolverPP2M(10)):
            assert torch.equal(sampler(alone, noise), sampler(routed, noise))

    def test_number_of_experts(self):
        with pytest.raises(ValueError, match="2 experts cannot serve the 3 intervals"):
            RoutedExperts(self.experts(2), self.partition)


@pytest.mark.parametrize("sampler", [DDIM(10), DDPM(10), DDIM(10, eta=0.5)])
def test_samples_depend_on_seed_and_index_alone(sampler):
    denoiser = NetworkDenoiser(Fake(), COSINE, Eps())
    together = sampler(denoiser, SampleNoise(0, [0, 1, 2], (1, 4, 4), "cpu"))
    alone = sampler(denoiser, SampleNoise(0, [2], (1, 4, 4), "cpu"))
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[1])
    other = sampler(denoiser, SampleNoise(1, [2], (1, 4, 4), "cpu"))
    assert not torch.equal(other, alone)


def test_describe_round_trip():
    from expertdiff.describe import build, describe, differences
    from expertdiff.diffusion.process import NoiseProcess

    process = DiscreteVP(QuadraticBetas(last=0.03), T=50)
    again = build(describe(process), NoiseProcess)
    assert torch.equal(again.alpha_bar, process.alpha_bar)
    other = describe(DiscreteVP(QuadraticBetas(last=0.04), T=50))
    assert differences(describe(process), other, "process") == ["process.betas.last: 0.03 != 0.04"]
    with pytest.raises(ValueError, match="not a NoiseProcess"):
        build(describe(Eps()), NoiseProcess)
    with pytest.raises(ValueError, match="cannot import os.nothing"):
        build({"class_path": "os.nothing", "init_args": {}}, NoiseProcess)
