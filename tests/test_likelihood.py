"""The log-likelihood by the probability flow in continuous time, of images, and over experts."""

import math

import pytest
import torch
from test_continuous import PROCESSES, Exact, each

from expertdiff.cli import main
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import VPSDE
from expertdiff.evaluation.likelihood import _times, bits_per_dimension, log_likelihood
from expertdiff.experts.routed import RoutedExperts

MEAN, STD = 0.3, 0.2


def normal_bits(x, process, mean=MEAN, std=STD):
    """Of data N(mean, std^2) in each dimension, as they are at the cleanest t."""
    t = torch.tensor([process.T_MIN], dtype=torch.float64)
    alpha, sigma = (c.item() for c in process.alpha_sigma(t))
    law = torch.distributions.Normal(alpha * mean, math.sqrt((alpha * std) ** 2 + sigma**2))
    return law.log_prob(x.double()).flatten(1).sum(1) / math.log(2)


def points(n=32, d=2):
    return MEAN + STD * torch.randn(n, d, generator=torch.Generator().manual_seed(0))


@each(PROCESSES)
def test_it_is_the_density(process):
    x = points()
    assert (log_likelihood(Exact(process), x) - normal_bits(x, process)).abs().max() < 5e-2


def test_a_probe_is_unbiased_and_takes_images():
    """The divergence of these data is the same in every dimension, so a probe finds it exactly."""
    process, x = VPSDE(), points(4, 12).reshape(4, 3, 2, 2)
    probe = torch.ones_like(x)
    probe[:, 0] = -1
    found = log_likelihood(Exact(process), x, probe)
    assert (found - normal_bits(x, process)).abs().max() < 0.1
    with pytest.raises(ValueError, match="or a probe"):
        log_likelihood(Exact(process), x)


def test_borders_have_a_point_on_each_side():
    partition = Partition([0, 0.2, 0.6, 1])
    process = VPSDE()
    routed = RoutedExperts([Exact(process, m) for m in (0, 1, 2)], partition)
    t = _times(routed)
    assert (t.diff() > 0).all()
    assert t[0].item() == pytest.approx(process.T_MIN) and t[-1].item() == pytest.approx(1)
    for i, edge in enumerate((0.2, 0.6)):
        sides = partition.index(t[(t - edge).abs() < 1e-9])
        assert sides.tolist() == [i, i + 1]


def test_copies_of_an_expert_have_its_likelihood():
    process, x = VPSDE(), points(8)
    routed = RoutedExperts([Exact(process)] * 3, Partition([0, 0.2, 0.6, 1]))
    alone = log_likelihood(Exact(process), x)
    assert (log_likelihood(routed, x) - alone).abs().max() < 5e-3


def test_each_expert_is_followed_on_its_own_side():
    """The flow of N(m, c^2) is affine, so two experts make a composition known in closed form."""
    process, edge, x = VPSDE(), 0.4, points(16, 1)
    low, high = Exact(process, 0.3, 0.2), Exact(process, -0.5, 0.4)
    found = log_likelihood(RoutedExperts([low, high], Partition([0, edge, 1])), x)
    at, bits = x.double(), torch.zeros(len(x), dtype=torch.float64)
    for expert, ends in ((low, (process.T_MIN, edge)), (high, (edge, 1.0))):
        a, s = process.alpha_sigma(torch.tensor(ends, dtype=torch.float64))
        std = ((a * expert.std) ** 2 + s**2).sqrt()
        at = a[1] * expert.mean + (at - a[0] * expert.mean) / std[0] * std[1]
        bits = bits + (std[1] / std[0]).log2()
    bits = bits + torch.distributions.Normal(0.0, 1.0).log_prob(at)[:, 0] / math.log(2)
    assert (found - bits).abs().max() < 2e-2


def test_bits_per_dimension_of_bytes():
    """Of images whose bytes are N(mean, std^2) in [-1, 1]: nearly the entropy of those."""
    process, g = VPSDE(), torch.Generator().manual_seed(1)
    x = MEAN + STD * torch.randn(40, 3, 8, 8, generator=g)
    images = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    index = list(range(40))
    found = bits_per_dimension(Exact(process), images, index)
    entropy = math.log2(127.5 * STD * math.sqrt(2 * math.pi * math.e))
    assert found.mean().item() == pytest.approx(entropy, abs=0.03)
    # A function of (seed, index) alone, however the images are batched.
    part = bits_per_dimension(Exact(process), images[10:12], index[10:12])
    assert torch.allclose(part, found[10:12])


def test_the_verb_tells_bits(study, capsys):
    bundle = str(study / "bundles/stitched")
    options = ["--data=Digits", "--data.validation_samples=12", "--samples=3"]
    assert main(["likelihood", bundle, *options]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "bits a dimension" in told and "n = 3" in told
    assert main(["likelihood", bundle, "--data=Digits", "--samples=1"]) == 2
    assert "ask about 2 or more" in capsys.readouterr().err
    for name in ("samples", "batch_size"):
        assert main(["likelihood", bundle, "--data=Digits", f"--{name}=-5"]) == 2
        said = capsys.readouterr().err
        assert f"{name} -5" in said and "must be at least 1" in said
    assert main(["likelihood", bundle, "--data=Toy2D", "--data.density=Moons"]) == 2
    assert "name the data it was trained on" in capsys.readouterr().err
