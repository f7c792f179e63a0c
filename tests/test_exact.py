"""The exact denoiser against closed forms and brute force."""

import math

import pytest
import torch

from expertdiff.diffusion import exact
from expertdiff.diffusion.exact import ExactDenoiser, Mixture, terminal_mismatch
from expertdiff.diffusion.process import VESDE, VPSDE, DiscreteVP, LinearBetas, QuadraticBetas
from expertdiff.diffusion.samplers import DDIM
from expertdiff.seeds import generator

PAPER = DiscreteVP(LinearBetas(1e-4, 0.02), T=100)
LONG = DiscreteVP(LinearBetas(1e-4, 0.02), T=1000)
"""Ends in pure noise: alpha_bar_T = 4e-5."""


def normal(*shape, key="test"):
    return torch.randn(shape, generator=generator("cpu", key), dtype=torch.float64)


def mixture(k=7, dim=2, std=0.3):
    shares = normal(k, key="shares").softmax(0)
    return Mixture(2 * normal(k, dim, key="centres"), shares, torch.linspace(1, 2, dim) * std)


def brute_force(mixture, process, x, t):
    """The posterior mean of one point, component by component, from Gaussian densities."""
    alpha, sigma = (c.item() for c in process.alpha_sigma(t))
    logs, means = [], []
    for centre, share in zip(mixture.centres, mixture.shares):
        std = (alpha**2 * mixture.std.double() ** 2 + sigma**2).sqrt()
        normals = torch.distributions.Normal(alpha * centre, std)
        logs.append(share.log() + normals.log_prob(x).sum())
        gain = alpha * mixture.std.double() ** 2 / std**2
        means.append(centre + gain * (x - alpha * centre))
    weights = [(log - max(logs)).exp() for log in logs]
    return sum(w * m for w, m in zip(weights, means)) / sum(weights)


def test_one_gaussian_has_its_closed_form():
    centre, std = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5, 2.0])
    denoiser = ExactDenoiser(Mixture(centre, torch.ones(1), std), PAPER)
    x, t = 3 * normal(50, 2).float(), torch.arange(0, 100, 2)
    alpha, sigma = (c[:, None].float() for c in PAPER.alpha_sigma(t))
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(denoiser(x, t).x0, centre + gain * (x - alpha * centre))


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_equals_brute_force_with_mixed_t(dim, std):
    data = mixture(dim=dim, std=std)
    x, t = normal(20, dim).float(), torch.arange(1, 100, 5)
    expected = [brute_force(data, PAPER, a.double(), b) for a, b in zip(x, t)]
    prediction = ExactDenoiser(data, PAPER)(x, t)
    torch.testing.assert_close(prediction.x0, torch.stack(expected).float())
    alpha, sigma = (c[:, None].float() for c in PAPER.alpha_sigma(t))
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x)


def test_many_chunks_equal_one(monkeypatch):
    denoiser, x, t = ExactDenoiser(mixture(), PAPER), normal(31, 2).float(), torch.arange(31)
    whole = denoiser(x, t)
    for pairs in (1, 5 * 7):  # less than a row; five rows, of which the last chunk has one
        monkeypatch.setattr(exact, "PAIRS", pairs)
        torch.testing.assert_close(denoiser(x, t).x0, whole.x0)


def test_any_shape_of_data():
    data, t = mixture(dim=12), torch.tensor([3, 70])
    x = normal(2, 3, 2, 2).float()
    prediction = ExactDenoiser(data, PAPER)(x, t)
    flat = ExactDenoiser(data, PAPER)(x.flatten(1), t)
    assert prediction.x0.shape == prediction.eps.shape == x.shape
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    assert torch.equal(prediction.x0.flatten(1), flat.x0)


def test_tells_the_true_noise_where_points_stand_far_apart():
    """At t = 0 sigma is 0.01, a hundredth of the spacing."""
    data = torch.cartesian_prod(torch.arange(-4.0, 5.0), torch.arange(-4.0, 5.0)).double()
    denoiser = ExactDenoiser(Mixture(data, torch.full((81,), 1 / 81), torch.zeros(2)), PAPER)
    eps, t = normal(81, 2), torch.zeros(81, dtype=torch.int64)
    prediction = denoiser(PAPER.add_noise(data, eps, t), t)
    torch.testing.assert_close(prediction.eps, eps.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(prediction.x0, data.float())


def test_tends_to_the_mean_of_the_data_in_pure_noise():
    data = mixture()
    x0 = ExactDenoiser(data, LONG)(normal(100, 2).float(), torch.full((100,), 999)).x0
    mean = (data.shares @ data.centres).float()
    assert (x0 - mean).abs().max() < 0.2
    early = ExactDenoiser(data, LONG)(normal(100, 2).float(), torch.full((100,), 100)).x0
    assert (early - mean).abs().max() > 1


def test_a_point_far_away_has_finite_predictions():
    prediction = ExactDenoiser(mixture(std=0), PAPER)(torch.full((1, 2), 1e4), torch.tensor([0]))
    assert prediction.x0.isfinite().all() and prediction.eps.isfinite().all()


def test_components_without_a_share_count_for_nothing():
    data, zeros = mixture(), torch.zeros(600, dtype=torch.float64)
    more = Mixture(
        torch.cat([normal(600, 2), data.centres]), torch.cat([zeros, data.shares]), data.std
    )
    x, t = normal(10, 2).float(), torch.arange(10)
    torch.testing.assert_close(
        ExactDenoiser(more, PAPER)(x, t).x0, ExactDenoiser(data, PAPER)(x, t).x0
    )


def test_gradients_equal_finite_differences():
    denoiser, t = ExactDenoiser(mixture(), PAPER), torch.tensor([20, 60])
    x, step = normal(2, 2).requires_grad_(), 1e-2

    def eps(x):
        return denoiser(x, t).eps.double()

    (gradient,) = torch.autograd.grad(eps(x).sum(), x)
    for d in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[d]
        slope = (eps(x + shift) - eps(x - shift)).sum(1) / (2 * step)
        torch.testing.assert_close(gradient[:, d], slope.detach(), atol=2e-3, rtol=0)


def test_sampling_gives_back_points_and_their_shares():
    points = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    denoiser = ExactDenoiser(Mixture(points, shares, torch.zeros(2)), LONG)
    start = normal(4000, 2).float()
    samples = DDIM(steps=100, clip=False)(denoiser, lambda step: start)
    distance, nearest = torch.cdist(samples, points.float()).min(1)
    assert distance.max() < 1e-3
    torch.testing.assert_close(nearest.bincount() / 4000, shares.float(), atol=0.03, rtol=0)


def test_terminal_mismatch_of_a_gaussian_is_its_divergence():
    x0 = torch.cartesian_prod(*2 * [torch.tensor([-1.0, 1.0])]) * torch.tensor([0.5, 3.0]) + 1
    normals = torch.distributions.Normal
    for process in (PAPER, DiscreteVP(QuadraticBetas(), T=65)):
        a = process.alpha_bar[-1].item()
        std = (a * torch.tensor([0.25, 9.0]) + 1 - a).sqrt()
        there = normals(math.sqrt(a) * torch.ones(2), std)
        bits = torch.distributions.kl_divergence(there, normals(0.0, 1.0)).sum() / math.log(2)
        assert terminal_mismatch(process, x0) == pytest.approx(bits.item(), rel=1e-5)


def test_terminal_mismatch_vanishes_where_the_chain_ends_in_noise():
    x0 = 2 * normal(1000, 2) + 1
    assert terminal_mismatch(LONG, x0) < 1e-3
    assert terminal_mismatch(PAPER, x0) > 0.3


@pytest.mark.parametrize("process", [VPSDE(), VESDE()])
def test_continuous_processes_end_in_their_prior(process):
    x0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    assert terminal_mismatch(process, x0) < 1e-3
