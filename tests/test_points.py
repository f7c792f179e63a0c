"""The measures of points against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from expertdiff.diffusion.denoiser import Denoiser, Prediction
from expertdiff.diffusion.exact import Mixture
from expertdiff.diffusion.process import CosineBetas, DiscreteVP, LinearBetas, NoiseProcess, expand
from expertdiff.evaluation.knn_kl import knn_kl_divergence
from expertdiff.evaluation.likelihood import log_likelihood
from expertdiff.evaluation.points import (
    limits_of,
    mmd,
    mode_coverage,
    save_points,
    save_scatter,
    scatter,
    sliced_wasserstein,
)

METRICS = ["chebyshev", "euclidean"]


def normal(n, d=2, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# The divergence of nearest neighbours -------------------------------------------------------------


def brute_force(x, y, k, metric):
    n, d = x.shape
    order = {"chebyshev": np.inf, "euclidean": 2}[metric]
    total = 0.0
    for i in range(n):
        rho = np.sort(np.linalg.norm(np.delete(x, i, 0) - x[i], order, axis=1))[k - 1]
        nu = np.sort(np.linalg.norm(y - x[i], order, axis=1))[k - 1]
        total += d / n * (math.log(nu) - math.log(rho))
    return (math.log(len(y)) - math.log(n - 1) + total) / math.log(2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_knn_kl_is_the_formula(metric, k, d):
    x, y = normal(60, d), 1.5 * normal(41, d, seed=1) + 0.3
    expected = brute_force(x, y, k, metric)
    assert knn_kl_divergence(x, y, k, metric) == pytest.approx(expected, rel=1e-12)
    assert knn_kl_divergence(torch.tensor(x), torch.tensor(y), k, metric) == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
def test_knn_kl_is_near_that_of_two_gaussians_in_both_directions(metric):
    x, y = normal(20000), 1.2 * normal(15000, seed=1) + [0.5, 0]
    # KL(N(0, 1) || N(mu, s^2)) = ln s + (1 + mu^2) / (2 s^2) - 1/2 nats an axis
    forward = 2 * math.log(1.2) + (2 + 0.25) / (2 * 1.44) - 1
    backward = -2 * math.log(1.2) + (2 * 1.44 + 0.25) / 2 - 1
    assert knn_kl_divergence(x, y, metric=metric) == pytest.approx(forward / math.log(2), abs=0.03)
    assert knn_kl_divergence(y, x, metric=metric) == pytest.approx(backward / math.log(2), abs=0.05)


def test_knn_kl_needs_no_units_and_no_origin():
    x, y = normal(300), normal(200, seed=1) * 1.2
    expected = knn_kl_divergence(x, y)
    assert knn_kl_divergence(7 * x - 3, 7 * y - 3) == pytest.approx(expected, abs=1e-9)
    assert knn_kl_divergence(7 * x, 7 * y - 3) != pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("k", [0, 8, 30])
def test_knn_kl_refuses_a_k_that_cannot_be_had(k):
    for n, m in [(8, 30), (30, 8)]:
        with pytest.raises(ValueError, match=rf"k = {k} .* n = {n} .* m = {m}"):
            knn_kl_divergence(normal(n), normal(m, seed=1), k)
    knn_kl_divergence(normal(8), normal(30, seed=1), k=7)


def test_knn_kl_counts_the_duplicates_it_refuses():
    x, y = normal(40), normal(30, seed=1)
    x[:4] = x[0]
    y[:3] = x[20]
    assert np.isfinite(knn_kl_divergence(x, y, k=4))
    with pytest.raises(ValueError, match="4 of the 40 .* own set and 1 in the other"):
        knn_kl_divergence(x, y, k=3)
    with pytest.raises(ValueError, match="3 of the 30 .* own set and 0 in the other"):
        knn_kl_divergence(y, x, k=2)
    with pytest.raises(ValueError, match="0 of the 40 .* own set and 1 in the other"):
        knn_kl_divergence(normal(40), y, k=2)


def test_knn_kl_refuses_points_it_cannot_compare():
    bad = normal(20)
    bad[3:5, 1] = [np.nan, np.inf]
    with pytest.raises(ValueError, match="2 of 20 points"):
        knn_kl_divergence(normal(20), bad)
    with pytest.raises(ValueError, match="of 2 and samples of 3 dimensions"):
        knn_kl_divergence(normal(20), normal(20, 3))
    with pytest.raises(ValueError, match=r"\[20\]"):
        knn_kl_divergence(normal(20)[:, 0], normal(20))
    with pytest.raises(ValueError, match="'cosine'"):
        knn_kl_divergence(normal(20), normal(20, seed=1), metric="cosine")


# Distances ----------------------------------------------------------------------------------------


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    x = normal(500)
    for shift in ([3, 4], [-5, 0], [0, 5]):
        assert sliced_wasserstein(x, x + shift) == pytest.approx(5 * 2 / math.pi, rel=1e-4)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_wasserstein_of_one_direction_is_the_best_assignment():
    # The only direction of one projection is the vertical one.
    x, y = normal(50), normal(50, seed=1) * 2 + 0.4
    cost = cdist(x[:, 1:], y[:, 1:])
    assert sliced_wasserstein(x, y, 1) == pytest.approx(cost[linear_sum_assignment(cost)].mean())


def test_sliced_wasserstein_compares_sets_of_different_sizes_by_their_quantiles():
    x, y = normal(60), normal(90, seed=1) + 0.5
    expected = sliced_wasserstein(x.repeat(3, 0), y.repeat(2, 0))
    assert sliced_wasserstein(x, y) == pytest.approx(expected)
    assert sliced_wasserstein(y, x) == pytest.approx(expected)


def test_sliced_wasserstein_of_two_gaussians():
    # Along every direction W1 of N(0, 1) and N(0, 4) is (2 - 1) E|N(0, 1)|.
    x, y = torch.tensor(normal(20000)), torch.tensor(2 * normal(15000, seed=1)).float()
    assert sliced_wasserstein(x, y) == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)


def test_mmd_is_the_unbiased_formula():
    x, y = normal(40), normal(700, seed=1) + 0.5
    h = np.median([np.linalg.norm(x[i] - x[j]) for i in range(40) for j in range(i)])

    def mean(a, b, pairs):
        return np.exp(-(cdist(a, b) ** 2) / (2 * h**2))[pairs].mean()

    expected = mean(x, x, ~np.eye(40, dtype=bool)) + mean(y, y, ~np.eye(700, dtype=bool))
    assert mmd(x, y) == pytest.approx(expected - 2 * mean(x, y, ...), rel=1e-9)
    assert mmd(3 * x + 1, 3 * y + 1) == pytest.approx(mmd(x, y), rel=1e-9)


def test_mmd_is_0_on_average_for_equal_distributions_only():
    # Below 0 as often as above: a biased estimate would always be above.
    equal = [mmd(normal(200, seed=2 * i), normal(200, seed=2 * i + 1)) for i in range(30)]
    assert abs(np.mean(equal)) < 1e-3 and min(equal) < 0 < max(equal)
    assert mmd(normal(200), normal(200, seed=1) + 0.5) > 0.03


def test_mmd_takes_the_first_5000_points():
    x, y = normal(5100), normal(5050, seed=1)
    assert mmd(x, y) == mmd(x[:5000], y[:5000])
    assert mmd(x[100:], y) != mmd(x[100:], y[50:])


def test_distances_refuse_what_has_none():
    for measure in (sliced_wasserstein, mmd):
        with pytest.raises(ValueError, match=r"\[20, 3\]"):
            measure(normal(20), normal(20, 3))
        with pytest.raises(ValueError, match=r"\[0, 2\]"):
            measure(normal(20), normal(0))
    with pytest.raises(ValueError, match="projections = 0"):
        sliced_wasserstein(normal(20), normal(20), 0)
    with pytest.raises(ValueError, match="20 and 1 points"):
        mmd(normal(20), normal(1))
    with pytest.raises(ValueError, match="of the 20 reference points coincide"):
        mmd(np.ones((20, 2)), normal(20))


# Modes --------------------------------------------------------------------------------------------

MODES = Mixture(
    centres=torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]),
    shares=torch.tensor([0.5, 0.25, 0.125, 0.125]),
    std=torch.tensor([0.5, 0.25]),
)


def test_coverage_counts_hits_shares_and_widths():
    # Each sample one true standard deviation off, along one axis.
    step = [[0.5, 0], [-0.5, 0], [0, 0.25], [0, -0.25]]
    samples = [[dx, dy] for dx, dy in step] + [[10 + dx, dy] for dx, dy in step]
    samples += [[3.0, 0], [5, 5]]
    found = mode_coverage(np.array(samples), MODES)
    assert found["modes"] == 2 and found["within"] == pytest.approx(0.8)
    # Hits: (1/2, 1/2, 0, 0), true: (1/2, 1/4, 1/8, 1/8)
    assert found["tv"] == pytest.approx(0.25)
    assert found["width"] == pytest.approx(math.sqrt(1 / 2))


def test_coverage_reaches_three_and_a_half_standard_deviations_of_each_axis():
    for outside, inside in ([[1.76, 0], [1.74, 0]], [[0, 0.88], [0, 0.87]]):
        assert mode_coverage(np.array([outside, inside]), MODES)["within"] == 0.5


def test_coverage_of_the_mixture_itself():
    rng = np.random.default_rng(0)
    n = 40000
    mode = rng.choice(4, n, p=MODES.shares.numpy())
    noise = rng.standard_normal((n, 2)) * MODES.std.numpy()
    samples = torch.tensor(MODES.centres.numpy()[mode] + noise).float()
    found = mode_coverage(samples, MODES)
    tail = math.exp(-(3.5**2) / 2)
    width = math.sqrt(1 - 3.5**2 / 2 * tail / (1 - tail))
    assert found["modes"] == 4
    assert found["within"] == pytest.approx(1 - tail, abs=1e-3)
    assert found["tv"] < 0.01
    assert found["width"] == pytest.approx(width, abs=0.01)
    narrow = torch.tensor(MODES.centres.numpy()[mode] + noise / 2)
    assert mode_coverage(narrow, MODES)["width"] == pytest.approx(0.5, abs=0.01)


def test_coverage_of_nothing():
    found = mode_coverage(torch.full((5, 2), 100.0), MODES)
    assert (found["modes"], found["within"], found["tv"]) == (0, 0, 1)
    assert math.isnan(found["width"])
    with pytest.raises(ValueError, match=r"standard deviation \[0.0, 0.0\]"):
        mode_coverage(torch.zeros(5, 2), MODES._replace(std=torch.zeros(2)))


# Files and pictures -------------------------------------------------------------------------------


def test_points_come_back_from_csv_to_the_last_bit(tmp_path):
    points = torch.tensor(normal(200) * [1e-6, 10] + [0, 4.6e6])
    path = tmp_path / "deep" / "points.csv"
    save_points(points, path)
    assert path.read_text().splitlines()[0] == "x,y"
    back = np.loadtxt(path, delimiter=",", skiprows=1)
    assert (back == points.numpy()).all()
    assert [file.name for file in path.parent.iterdir()] == ["points.csv"]


def test_limits_hold_all_points_with_a_margin():
    lo, hi = limits_of(np.array([[0.0, -2], [10, 0], [4, 2]]))
    assert lo == pytest.approx([-0.5, -2.5]) and hi == pytest.approx([10.5, 2.5])
    lo, hi = limits_of(torch.ones(3, 2))
    assert (lo < 1).all() and (hi > 1).all()


def test_scatter_draws_every_point_to_one_scale():
    points = normal(50)
    axes = Figure().subplots()
    scatter(axes, points, (np.array([-3, -4]), np.array([5, 6])))
    assert np.allclose(axes.collections[0].get_offsets(), points)
    assert axes.get_xlim() == (-3, 5) and axes.get_ylim() == (-4, 6)
    assert axes.get_aspect() == 1 and not axes.axison


def test_pictures_of_one_frame_show_a_point_at_one_place(tmp_path):
    frame = (np.array([0.0, 0.0]), np.array([10.0, 10.0]))
    dark = []
    for name, others in (("a", [[1.0, 1.0]]), ("b", [[9.0, 1.0], [40.0, 3.0]])):
        save_scatter(np.array([[2.0, 7.0], *others]), tmp_path / f"{name}.png", frame)
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert image.shape == (600, 600)
        dark.append(image < 240)
    both = np.argwhere(dark[0] & dark[1])
    # Rows run downwards from y = 10.
    assert len(both) and np.abs(both - [180, 120]).max() <= 2
    assert len(list(tmp_path.iterdir())) == 2


# Likelihood ---------------------------------------------------------------------------------------


class Gaussians(Denoiser):
    """The exact denoiser of a mixture of K Gaussians N(mean, diag(std^2)), all [K, D]."""

    def __init__(self, process, shares, mean, std):
        super().__init__()
        self.process = process
        self.shares, self.mean, self.std = (torch.tensor(v).double() for v in (shares, mean, std))

    def components(self, alpha, sigma):
        mean = alpha * self.mean
        std = ((alpha * self.std).square() + sigma**2).sqrt()
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(self.shares),
            torch.distributions.Independent(torch.distributions.Normal(mean, std), 1),
        )

    def log_density(self, x, alpha=1.0, sigma=0.0):
        """In bits."""
        return self.components(alpha, sigma).log_prob(x) / math.log(2)

    def forward(self, x_t, t, y=None):
        (alpha,), (sigma,) = (c.unique() for c in self.process.alpha_sigma(t))
        x = x_t.double()
        variance = (alpha * self.std).square() + sigma**2  # [K, D]
        off = x[:, None] - alpha * self.mean  # [B, K, D]
        logits = self.shares.log() - 0.5 * (off.square() / variance + variance.log()).sum(-1)
        eps = sigma * (logits.softmax(1)[..., None] * off / variance).sum(1)
        return Prediction(((x - sigma * eps) / alpha).float(), eps.float())


COSINE = DiscreteVP(CosineBetas())
ONE = ([1.0], [[0.6, -1.3]], [[1.5, 0.2]])
THREE = ([0.5, 0.3, 0.2], [[-1.5, 0.0], [0.6, 0.4], [0.8, -2.0]], [[0.3, 0.1], [0.2, 0.6], [1, 1]])


def at_start(denoiser, n, seed=0):
    """Points of the flow's marginal at t = 0 and their log-density there, in bits."""
    alpha, sigma = (c.item() for c in denoiser.process.alpha_sigma(torch.tensor(0)))
    blurred = denoiser.components(alpha, sigma)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = blurred.sample((n,))
    return x.float(), denoiser.log_density(x.float(), alpha, sigma)


@pytest.mark.parametrize("mixture", [ONE, THREE])
def test_log_likelihood_is_the_density_at_every_point(mixture):
    denoiser = Gaussians(COSINE, *mixture)
    x, expected = at_start(denoiser, 64)
    found = log_likelihood(denoiser, x)
    assert found.dtype == torch.float64 and found.shape == (64,)
    assert (found - expected).abs().max() < 1e-2
    # Of the data themselves, as the blur is far below their width.
    assert (found - denoiser.log_density(x)).abs().max() < 3e-2
    # The test tells a wrong model from a right one.
    assert (found - denoiser.log_density(-x)).abs().max() > 1


def test_log_likelihood_of_one_axis_and_of_three():
    for shares, mean, std in (([1.0], [[0.5]], [[0.3]]), ([1.0], [[0, 1, 2]], [[0.3, 1, 2]])):
        denoiser = Gaussians(COSINE, shares, mean, std)
        x, expected = at_start(denoiser, 16)
        assert (log_likelihood(denoiser, x) - expected).abs().max() < 1e-2


def test_log_likelihood_ends_with_the_noise_the_sampler_starts_from():
    # alpha_bar_T = .364: the flow of N(mu, c^2) is affine, but ends far from N(0, I).
    process = DiscreteVP(LinearBetas(), T=100)
    denoiser = Gaussians(process, *ONE)
    x, _ = at_start(denoiser, 32)
    (a0, a1), (s0, s1) = process.alpha_sigma(torch.tensor([0, 99]))
    std = [((a * denoiser.std).square() + s**2).sqrt() for a, s in ((a0, s0), (a1, s1))]
    end = a1 * denoiser.mean + (x - a0 * denoiser.mean) / std[0] * std[1]
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = (normal.log_prob(end) + (std[1] / std[0]).log()).sum(1) / math.log(2)
    assert (log_likelihood(denoiser, x) - expected).abs().max() < 2e-2


def test_mean_log_likelihood_is_minus_the_entropy():
    # Of N(mu, c^2): -log2(c sqrt(2 pi e)) an axis; the mean of 400 points is off by about .05.
    denoiser = Gaussians(COSINE, *ONE)
    x, _ = at_start(denoiser, 400)
    entropy = (denoiser.std * math.sqrt(2 * math.pi * math.e)).log2().sum().item()
    assert log_likelihood(denoiser, x).mean().item() == pytest.approx(-entropy, abs=0.15)


def test_log_likelihood_works_where_gradients_are_off():
    denoiser = Gaussians(DiscreteVP(CosineBetas(), T=20), *ONE)
    x = torch.zeros(3, 2)
    expected = log_likelihood(denoiser, x)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(log_likelihood(denoiser, x.clone()), expected)
    assert not expected.requires_grad and not x.requires_grad


def test_log_likelihood_refuses_what_it_cannot_follow():
    class Other(NoiseProcess):
        def alpha_sigma(self, t):
            return expand(t, t), t

        progress = times = visited = at_log_snr = alpha_sigma

    with pytest.raises(ValueError, match="not for Other"):
        log_likelihood(Gaussians(Other(), *ONE), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\[3\]"):
        log_likelihood(Gaussians(COSINE, *ONE), torch.zeros(3))
