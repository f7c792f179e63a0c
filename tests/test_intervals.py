"""Intervals: the exact cut, and each rule against closed forms and planted boundaries."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn

from expertdiff import config_verbs
from expertdiff.analysis.intervals import (
    AttentionConcentration,
    GradientSimilarity,
    IntervalMethod,
    LogSNR,
    OptimalDenoiser,
    Selection,
    UniformLength,
    attention,
    every,
    gradients,
    optimal,
    select,
)
from expertdiff.analysis.intervals.attention import bound, change_points, concentration, names
from expertdiff.analysis.intervals.base import Cells, Curve
from expertdiff.analysis.intervals.gradients import Sketch
from expertdiff.analysis.intervals.optimal import optimal_eps
from expertdiff.analysis.intervals.segments import cheapest, middle, to_middle
from expertdiff.analysis.intervals.selection import selection_figure
from expertdiff.bundle import Bundle
from expertdiff.data import Data, Digits
from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.exact import ExactDenoiser, Mixture
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import VPSDE, CosineBetas, DiscreteVP, LinearBetas, NoiseProcess
from expertdiff.experts.routed import RoutedExperts
from expertdiff.files import Unusable
from expertdiff.networks.ddpmpp import DDPMpp
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.network import Network
from expertdiff.networks.unet import ADMUNet, AttentionBlock
from expertdiff.seeds import generator

COSINE, SHORT = DiscreteVP(CosineBetas()), DiscreteVP(LinearBetas(), T=100)


def normal(*shape, key="test"):
    return torch.randn(shape, generator=generator("cpu", key))


class Given(Data):
    """These items, as they are."""

    def __init__(self, items):
        super().__init__(batch_size=1)
        self.items, self.shape, self.num_classes = items, tuple(items.shape[1:]), 3

    def read(self, name):
        return self.items, torch.arange(len(self.items)) % 3

    def scaled(self, items):
        return items.float()


def bundle_of(network, process=SHORT, shape=(1, 8, 8)):
    denoiser = NetworkDenoiser(network, process, Eps()).eval().requires_grad_(False)
    return around(denoiser, network, shape)


def around(denoiser, network, shape):
    shared = {"data": {"shape": list(shape)}, "network": describe(network)}
    return Bundle(denoiser, {"shared": shared}, Path("some/bundle"))


# The exact cut ------------------------------------------------------------------------------------


def brute_force(costs, k):
    """The least cost over all cuts of n points into k segments."""
    n = len(costs)
    cuts = itertools.combinations(range(1, n), k - 1)
    return min(sum(costs[i, j] for i, j in zip((0, *c), (*c, n))) for c in cuts)


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 9), (-3, 0, 5), (0,)])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_cut_equals_brute_force(n, values):
    costs = np.random.default_rng(n).choice(values, (n, n + 1)).astype(float)
    for k in range(1, n + 1):
        ends, cost = cheapest(n, k, lambda i, j: costs[i, j])
        assert ends[0] == 0 and ends[-1] == n and len(ends) == k + 1
        assert all(a < b for a, b in zip(ends, ends[1:]))
        assert cost == sum(costs[i, j] for i, j in zip(ends, ends[1:])) == brute_force(costs, k)


@pytest.mark.parametrize("k", [0, 4])
def test_a_cut_into_more_segments_than_points_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} .* 3 points: give a k from 1 to 3"):
        cheapest(3, k, lambda i, j: 0.0)


def test_distance_to_the_middle():
    cost = to_middle(np.array([1.0, 2.0, 4.0, 9.0]))
    assert [cost(1, 2), cost(0, 3), cost(0, 4)] == [0, 1 + 2, 1 + 2 + 7]


@pytest.mark.parametrize("boundary", [1, 40, 99])
def test_a_planted_boundary_of_two_blocks_is_found(boundary):
    block = np.arange(100) >= boundary
    affinity = (block[:, None] == block).astype(float) + 0.01 * normal(100, 100).numpy()
    ends, _ = cheapest(100, 2, lambda i, j: -affinity[middle(i, j), i:j].sum())
    assert ends == [0, boundary, 100]


# The grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, n", [(1000, 100), (250, 100), (100, 100), (65, 65), (2, 2)])
def test_cells_of_a_discrete_chain_end_on_its_steps(T, n):
    cells = Cells.of(DiscreteVP(LinearBetas(1e-4, 0.01), T))
    steps = [interval.steps(T) for interval in cells.partition.intervals()]
    assert len(cells.t) == len(steps) == n
    assert [t in own for t, own in zip(cells.t.tolist(), steps)] == n * [True]
    assert max(map(len, steps)) - min(map(len, steps)) <= 1
    assert [round(edge * T) / T for edge in cells.partition.edges] == list(cells.partition.edges)


def test_cells_of_continuous_time_are_hundredths():
    cells = Cells.of(VPSDE())
    assert cells.partition == Partition([i / 100 for i in range(101)])
    assert cells.progress == pytest.approx([(i + 0.5) / 100 for i in range(100)], abs=1e-5)


# Schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [COSINE, SHORT, VPSDE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 100])
def test_uniform_intervals_are_of_one_length_and_of_the_least_cost(k, process):
    chosen = UniformLength()(k, process, None, None)
    assert chosen.partition.edges == pytest.approx([i / k for i in range(k + 1)], abs=0.00501)
    _, least = cheapest(100, k, to_middle(Cells.of(process).t.double().numpy()))
    assert chosen.cost == pytest.approx(least)


def test_three_uniform_intervals_are_the_published_ones():
    assert UniformLength()(3, COSINE, None, None).partition == Partition([0, 0.33, 0.67, 1])


@pytest.mark.parametrize(
    "process, expected",
    [
        (COSINE, (0.29, 0.72)),
        (VPSDE(), (0.348, 0.709)),
        (DiscreteVP(LinearBetas()), (0.348, 0.709)),
    ],
)
def test_log_snr_has_the_published_edges(process, expected):
    chosen = LogSNR()(3, process, None, None)
    assert chosen.partition.edges[1:3] == pytest.approx(expected, abs=0.0101)
    (curve,) = chosen.curves
    alpha, sigma = process.alpha_sigma(Cells.of(process).t)
    assert curve.y == pytest.approx((2 * (alpha / sigma).log()).tolist())


def test_log_snr_that_falls_evenly_has_intervals_of_one_length():
    class Even(VPSDE):
        def snr(self, t):
            return (-8 * t).exp()

    assert LogSNR()(4, Even(), None, None).partition.edges == pytest.approx([0, 0.25, 0.5, 0.75, 1])


# Gradients ----------------------------------------------------------------------------------------


class Blocks(Network):
    """Each of several parts of the chain of 100 has a parameter of its own."""

    def __init__(self, starts: tuple[int, ...]) -> None:
        super().__init__()
        self.starts = torch.tensor(starts)
        self.scales = nn.Parameter(torch.zeros(len(starts) + 1))

    def forward(self, x_t, t, y=None):
        return self.scales[torch.bucketize(t, self.starts, right=True)][:, None] * x_t


@pytest.mark.parametrize("starts", [(10,), (40,), (20, 70), (10, 30, 90)])
def test_gradients_tell_which_steps_share_parameters(starts):
    # Without data x_t is noise, and the gradient of a scale has the same sign at every t.
    data, bundle = Given(torch.zeros(20, 2)), bundle_of(Blocks(starts), shape=(2,))
    method = GradientSimilarity(images=8)
    chosen = method(len(starts) + 1, SHORT, data, bundle)
    assert chosen.partition.edges == pytest.approx([0, *(s / 100 for s in starts), 1])
    assert chosen.cost == pytest.approx(-100, abs=1e-4)
    block = np.searchsorted(starts, np.arange(100), side="right")
    affinity = method.affinity(bundle.denoiser, data, torch.arange(100))
    assert affinity == pytest.approx((block[:, None] == block).astype(float), abs=1e-5)
    assert len(chosen.curves) == len(starts) + 1
    assert sum(np.array(curve.y) for curve in chosen.curves) == pytest.approx(np.ones(100))


class Shifted(Blocks):
    """As `Blocks`, and with a parameter of all steps that is not trained."""

    def __init__(self, starts: tuple[int, ...]) -> None:
        super().__init__(starts)
        self.shift = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x_t, t, y=None):
        return super().forward(x_t, t) + self.shift


def test_gradients_are_of_what_is_trained():
    data, t, method = Given(torch.zeros(20, 2)), torch.tensor([10, 80]), GradientSimilarity(8)
    found = [
        method.affinity(bundle_of(network, shape=(2,)).denoiser, data, t)
        for network in (Blocks((40,)), Shifted((40,)))
    ]
    assert found[0] == pytest.approx(np.eye(2), abs=1e-5) and np.array_equal(*found)


def test_gradients_are_those_of_the_loss():
    torch.manual_seed(0)
    bundle = bundle_of(MLPDenoiser(width=8, depth=1), shape=(2,))
    data, network = Given(normal(10, 2)), bundle.denoiser.network
    method, t = GradientSimilarity(images=10), torch.tensor([0, 30, 99])
    affinity = method.affinity(bundle.denoiser, data, t)
    # The same images and noise, by the definition.
    ((batch, eps),) = method._batches(data, with_labels=False)
    network.requires_grad_(True)
    rows = []
    for step in t:
        alpha, sigma = (c.float() for c in SHORT.alpha_sigma(step))
        output = network(alpha * batch.x0 + sigma * eps, step.expand(10))
        grads = torch.autograd.grad((output - eps).square().mean(), list(network.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    expected = F.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows), dim=-1)
    assert affinity == pytest.approx(expected.numpy(), abs=1e-5)
    assert 0.01 < affinity[0, 2] < 0.99 or affinity[0, 2] < 0  # not all alike


def test_gradients_do_not_depend_on_the_batch_and_leave_the_bundle_alone():
    torch.manual_seed(0)
    network = ADMUNet(8, 1, 8, 1, (1, 2), (4,), 8, num_classes=3)
    bundle, data = bundle_of(network), Given(normal(7, 1, 8, 8).clamp(-1, 1))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    t = torch.tensor([2, 50])
    affinity = [
        GradientSimilarity(images=9, batch_size=size).affinity(bundle.denoiser, data, t)
        for size in (2, 9)
    ]
    assert affinity[0] == pytest.approx(affinity[1], abs=1e-4)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_a_sketch_keeps_cosines(monkeypatch):
    a, b = normal(200_000, key="a"), normal(200_000, key="b")
    b = 0.6 * a + 0.8 * b
    sketch = Sketch(200_000, seed=0)
    assert sketch(a).shape == (2**16,)
    for x, y in ((a, a), (a, b), (b, -a)):
        assert F.cosine_similarity(sketch(x), sketch(y), dim=0).item() == pytest.approx(
            F.cosine_similarity(x, y, dim=0).item(), abs=0.015
        )
    assert torch.allclose(sketch(a + b), sketch(a) + sketch(b), atol=1e-4)
    assert sketch(a).norm().item() == pytest.approx(a.norm().item(), rel=0.02)
    # A network that counts as large gives nearly the same.
    torch.manual_seed(0)
    bundle, data = bundle_of(MLPDenoiser(width=32), shape=(2,)), Given(normal(10, 2))
    t, method = torch.tensor([0, 50, 99]), GradientSimilarity()
    whole = method.affinity(bundle.denoiser, data, t)
    monkeypatch.setattr(gradients, "EXACT", 0)
    sketched = method.affinity(bundle.denoiser, data, t)
    assert sketched == pytest.approx(whole, abs=0.03) and not (sketched == whole).all()


def test_gradients_of_several_networks_are_refused():
    one = bundle_of(Blocks((40,)), shape=(2,))
    routed = RoutedExperts([one.denoiser, one.denoiser], Partition([0, 0.5, 1]))
    with pytest.raises(ValueError, match="some/bundle holds several networks"):
        GradientSimilarity()(2, SHORT, Given(normal(5, 2)), around(routed, Blocks((1,)), (2,)))


# The best denoiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [SHORT, COSINE, VPSDE()], ids=lambda p: type(p).__name__)
def test_eps_is_that_of_the_exact_denoiser(process, monkeypatch):
    items = normal(50, 3, 2)
    centres = items.flatten(1).double()
    exact = ExactDenoiser(Mixture(centres, torch.full((50,), 1 / 50), torch.zeros(6)), process)
    t = Cells.of(process).t[::10]
    x = process.add_noise(centres[:10], normal(10, 6).double(), t)
    whole = optimal_eps(x, t, process, items, lambda y: y)
    torch.testing.assert_close(whole.float(), exact(x, t).eps, atol=2e-5, rtol=1e-5)
    monkeypatch.setattr(optimal, "_rows", lambda items: 7)  # the last part has one
    torch.testing.assert_close(optimal_eps(x, t, process, items, lambda y: y), whole)


def test_eps_tends_to_the_true_noise_at_the_clean_end_and_to_the_mean_at_the_noisy_one():
    items = normal(30, 4)
    y, eps, process = items[:5].double(), normal(5, 4, key="eps").double(), VPSDE()
    error = []
    for time in (0.2, 0.1, 0.05, 0.01):
        t = torch.full((5,), time, dtype=torch.float64)
        best = optimal_eps(process.add_noise(y, eps, t), t, process, items, lambda y: y)
        error.append((best - eps).abs().max().item())
    assert error == sorted(error, reverse=True) and error[-1] < 1e-6
    t = torch.ones(5, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in process.alpha_sigma(t))
    best = optimal_eps(eps, t, process, items, lambda y: y)
    torch.testing.assert_close(
        best, (eps - alpha * items.double().mean(0)) / sigma, atol=1e-3, rtol=0
    )


def planted(method, clean, noisy):
    method.nearness = lambda *_: (np.array(clean), np.array(noisy))
    return method


def test_the_edges_follow_from_the_average_shares():
    # 1 of 30 cells averages 0.9 over 33; 40 cells of 1 average 0.9 over 44.
    method = planted(OptimalDenoiser(), 30 * [1.0] + 70 * [0.0], 60 * [0.0] + 40 * [1.0])
    chosen = method(3, COSINE, None, None)
    assert chosen.partition.edges == pytest.approx([0, 0.33, 0.56, 1])
    assert [curve.y for curve in chosen.curves] == [
        30 * [1.0] + 70 * [0.0],
        60 * [0.0] + 40 * [1.0],
    ]


@pytest.mark.parametrize(
    "clean, noisy, message",
    [
        (100 * [0.5], 100 * [1.0], "clean end says, but 0.5 to 0.5 of them on average: raise eta"),
        (50 * [1.0] + 50 * [0.0], [1.0] + 99 * [0.25], "noisy end says, but 0.25 to 0.258 "),
        (100 * [1.0], 100 * [1.0], "end at 1, and the noisy one begin at 0 .* lower eta 0.00781"),
    ],
)
def test_no_edges_are_refused_with_the_range_of_the_curve(clean, noisy, message):
    with pytest.raises(ValueError, match=message):
        planted(OptimalDenoiser(), clean, noisy)(3, COSINE, None, None)


@pytest.mark.parametrize("reference", ["script", "paper"])
def test_one_item_has_both_ends_everywhere(reference):
    method = OptimalDenoiser(triples=100, reference=reference)
    clean, noisy = method.nearness(COSINE, Given(normal(1, 4)), Cells.of(COSINE).t)
    assert (clean == 1).all() and (noisy == 1).all()


def test_digits_have_the_measured_edges_with_any_seed():
    data, edges = Digits(), {}
    for reference in ("script", "paper"):
        methods = [OptimalDenoiser(reference=reference, seed=s) for s in range(3)]
        found = np.array([m(3, VPSDE(), data, None).partition.edges[1:3] for m in methods])
        assert np.ptp(found, axis=0).max() <= 0.02
        edges[reference] = found.mean(0)
    assert edges["script"] == pytest.approx([0.19, 0.58], abs=0.02)
    assert edges["paper"] == pytest.approx([0.19, 0.865], abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"eta": 0.0}, "eta 0.0"),
        ({"share": 1.0}, "share 1.0"),
        ({"triples": 0}, "triples 0"),
        ({"reference": "code"}, "'code' must be one of script, paper"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptimalDenoiser(**arguments)


def test_fewer_triples_than_cells_are_refused():
    with pytest.raises(ValueError, match="99 triples .* give at least 100"):
        OptimalDenoiser(triples=99)(3, COSINE, Given(normal(5, 2)), None)


# Attention ----------------------------------------------------------------------------------------


def test_even_attention_has_no_concentration():
    q, k = normal(2, 3, 16, 4), normal(2, 3, 1, 4).expand(2, 3, 16, 4)
    assert concentration(q, k).abs().max() < 1e-6


def test_attention_on_one_key_has_the_bound():
    one_hot = 1e3 * torch.eye(16).expand(2, 3, 16, 16)
    relative = concentration(one_hot, one_hot) / bound(np.array(16))
    torch.testing.assert_close(relative.float(), torch.ones(2))
    assert bound(np.array([16, 64, 256, 1024])) == pytest.approx(
        [0.242, 0.124, 0.0624, 0.0312], abs=5e-4
    )


def test_concentration_is_that_of_the_definition(monkeypatch):
    q, k = 3 * normal(3, 2, 9, 4, key="q"), normal(3, 2, 9, 4, key="k")
    expected = []
    for image in range(3):
        stds = [
            np.std(
                np.exp(s := (k[image, h] @ q[image, h, i] / 2).double().numpy()) / np.exp(s).sum()
            )
            for h in range(2)
            for i in range(9)
        ]
        expected.append(np.mean(stds))
    assert concentration(q, k).numpy() == pytest.approx(np.array(expected), rel=1e-5)
    order = torch.randperm(9, generator=generator("cpu", "order"))
    torch.testing.assert_close(concentration(q, k[:, :, order]), concentration(q, k))
    monkeypatch.setattr(attention, "WEIGHTS", 1)
    assert concentration(q, k).numpy() == pytest.approx(np.array(expected), rel=1e-5)


def test_layers_are_named_by_side_and_order():
    keys = np.array([64, 64, 16, 64, 16])
    assert names(keys) == ["8-1", "8-2", "4-1", "8-3", "4-2"]


def of_slopes(cuts, slopes):
    """50 points of a curve that has these slopes, by the progress, before, between, after."""
    x, slope = np.arange(1, 51) / 50, np.repeat(slopes, np.diff([0, *cuts, 49]))
    return x, np.concatenate([[0], (slope * np.diff(x)).cumsum()]) + 1e-4 * normal(50).numpy()


@pytest.mark.parametrize("slopes", [(2.0, 0.5, -1.0), (1.0, -0.3, -3.0)])
@pytest.mark.parametrize("cuts", [(10, 30), (5, 44), (20, 25)])
def test_kinks_of_a_curve_are_found(cuts, slopes):
    x, y = of_slopes(cuts, slopes)
    partition, cost = change_points(x, y)
    assert partition.edges == pytest.approx([0, x[cuts[0]], x[cuts[1]], 1])
    assert 0 <= cost < 1


def test_an_outlier_is_no_interval():
    x, y = of_slopes((20, 35), (2.0, 0.1, -0.3))
    y[-1] -= 0.034  # a slope of -2
    slope = np.diff(y) / np.diff(x)
    ends, _ = cheapest(49, 3, lambda i, j: (j - i) * slope[i:j].var())
    assert ends == [0, 20, 48, 49]
    assert change_points(x, y)[0].edges == pytest.approx([0, x[20], x[35], 1])


@pytest.mark.parametrize(
    "slopes, told",
    [
        ((-1.0, 0.1, 2.0), "-2, -0.1 and 1"),
        ((2.0, 1.0, 0.1), "-0.1, -1 and -2"),
        ((0.5, 2.0, -1.0), "1, -2 and -0.5"),
    ],
)
def test_a_curve_of_another_shape_is_refused_with_its_slopes(slopes, told):
    x, y = of_slopes((10, 30), slopes)
    with pytest.raises(
        ValueError, match=r"does not rise, stay and fall: .* \[0, 0.22, 0.62, 1\] are"
    ) as raised:
        change_points(x, y.round(3))
    numbers = re.search(r"are (.*); take another method", str(raised.value))[1]
    assert [float(n) for n in re.split(", | and ", numbers)] == pytest.approx(
        [float(n) for n in re.split(", | and ", told)], abs=0.02
    )


class Attention(nn.Module):
    """Of n keys, as concentrated as its input r says, relative to attention on one key."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def queries_keys_values(self, r):
        # softmax(z, 0, .., 0) has the first weight less the others = (e^z - 1) / (e^z + n - 1).
        z, keys = ((1 + (self.n - 1) * r) / (1 - r)).log(), torch.eye(self.n)[None, None]
        return z[:, None, None, None] * self.n**0.5 * keys, keys.expand(len(r), -1, -1, -1), None

    def forward(self, r):
        return r


class Hump(Network):
    """Its attention rises from noise on, stays between two borders, falls towards the data."""

    def __init__(self, steps: int = 100, clean: float = 0.2, noisy: float = 0.7) -> None:
        super().__init__()
        self.steps, self.clean, self.noisy = steps, clean, noisy
        self.layers = nn.ModuleList([Attention(16), Attention(64)])
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y=None):
        u = (t + 1) / self.steps
        r = torch.minimum(u / self.clean, (1 - u) / (1 - self.noisy)).clamp(max=1)
        for layer, share in zip(self.layers, (0.8, 0.4)):
            layer(share * r)
        return self.w * x_t


@pytest.mark.parametrize("borders", [(0.2, 0.7), (0.1, 0.8), (0.45, 0.55)])
def test_planted_borders_of_attention_are_found(borders):
    chosen = AttentionConcentration(samples=2, steps=100)(
        3, SHORT, None, bundle_of(Hump(100, *borders))
    )
    assert chosen.partition.edges == pytest.approx([0, *borders, 1])
    mean = chosen.curves[0].y
    assert max(mean) == pytest.approx(0.6, rel=1e-4) and mean[-1] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("steps", [3, "ddim3"])
def test_too_few_steps_are_refused_by_their_name(steps, monkeypatch):
    monkeypatch.setattr(AttentionConcentration, "curves", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=f"steps {steps} visit [34] t, .* give at least 4"):
        AttentionConcentration(steps=steps)(3, SHORT, None, bundle_of(Hump()))


def unet_with_attention(**options):
    """Attention at 8 x 8 and, once in the middle, at 4 x 4; no zeros left of initialisation."""
    torch.manual_seed(0)
    network = ADMUNet(8, 1, 8, 1, (1, 2), (8,), 8, learn_sigma=False, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def ddpmpp():
    torch.manual_seed(0)
    return DDPMpp(8, 1, 8, 1, (1, 2), (8,))


@pytest.mark.parametrize(
    "network, process, layers",
    [
        (unet_with_attention(), SHORT, ["8-1", "4-1", "8-2", "8-3"]),
        (
            unet_with_attention(use_new_attention_order=True, num_classes=3),
            SHORT,
            ["8-1", "4-1", "8-2", "8-3"],
        ),
        (ddpmpp(), VPSDE(), ["8-1", "4-1", "8-2"]),
    ],
    ids=["ADM", "ADM of classes", "DDPM++"],
)
def test_curves_are_of_the_attention_that_the_network_computes(
    network, process, layers, monkeypatch
):
    seen = []

    def attend(q, k, v):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        seen.append(weights.std(-1, correction=0).mean().item())
        return weights @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    method = AttentionConcentration(samples=3, steps=4)
    x, keys, curves = method.curves(bundle_of(network, process))
    u = [0.01, 0.34, 0.67, 1.0] if process is SHORT else [0.001, 0.334, 0.667, 1.0]
    assert x == pytest.approx(np.array(u))  # data first
    assert names(keys) == layers
    assert curves == pytest.approx(np.array(seen).reshape(4, -1)[::-1].T, rel=1e-5)
    assert np.ptp(curves, axis=1).min() > 0  # it changes along the way


def test_curves_do_not_depend_on_the_batch_and_leave_no_hooks():
    bundle = bundle_of(unet_with_attention())
    curves = [
        AttentionConcentration(samples=5, steps=4, batch_size=size).curves(bundle)[2]
        for size in (2, 5)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert not any(module._forward_pre_hooks for module in bundle.denoiser.modules())


def test_a_network_that_attends_evenly_has_curves_of_zero():
    network = unet_with_attention()
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            nn.init.zeros_(module.qkv.weight)
    _, _, curves = AttentionConcentration(samples=2, steps=4).curves(bundle_of(network))
    assert np.abs(curves).max() < 1e-6


def test_experts_side_by_side_give_one_set_of_curves():
    network = Hump()
    denoiser = bundle_of(network).denoiser
    routed = around(RoutedExperts([denoiser] * 2, Partition([0, 0.5, 1])), network, (1, 8, 8))
    method = AttentionConcentration(samples=2, steps=10)
    assert method(3, SHORT, None, routed) == method(3, SHORT, None, bundle_of(network))


def test_the_average_is_of_layers_relative_to_their_bounds():
    chosen = AttentionConcentration(samples=2, steps=10)(3, SHORT, None, bundle_of(Hump()))
    mean, *layers = chosen.curves
    assert [curve.label for curve in layers] == ["4-1", "8-1"]
    bounds = bound(np.array([16, 64]))
    expected = np.mean([np.array(c.y) / b for c, b in zip(layers, bounds)], axis=0)
    assert mean.y == pytest.approx(expected)
    assert set(chosen.partition.edges[1:3]) < set(mean.x) and len(chosen.partition) == 3


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match="some/bundle has no attention"):
        AttentionConcentration()(3, SHORT, None, bundle_of(MLPDenoiser(), shape=(2,)))
    one_pixel = ADMUNet(2, 1, 8, 1, (1, 1), (), 8, learn_sigma=False)  # attends in the middle only
    with pytest.raises(ValueError, match="some/bundle has no attention"):
        AttentionConcentration()(3, SHORT, None, bundle_of(one_pixel, shape=(1, 2, 2)))


# All of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [OptimalDenoiser(), AttentionConcentration()])
def test_rules_for_three_intervals_refuse_other_numbers(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__} finds 3 intervals, not k = 4"):
        method(4, COSINE, None, None)


@pytest.mark.parametrize("method", [GradientSimilarity(), AttentionConcentration()])
def test_rules_that_look_at_a_network_ask_for_it(method):
    with pytest.raises(ValueError, match="trained network: name a bundle"):
        method(3, COSINE, Given(normal(5, 2)), None)


def test_one_method_writes_edges_that_make_a_partition(tmp_path, capsys):
    method = OptimalDenoiser(triples=200, seed=1)
    (chosen,) = select([method], 3, VPSDE(), Digits(), None, tmp_path)
    record = json.loads((tmp_path / "intervals.json").read_text())
    assert Partition(record["edges"]) == chosen.partition
    entry = record["methods"]["OptimalDenoiser"]
    assert entry["edges"] == record["edges"] and entry["cost"] is None
    again = build(entry["method"], IntervalMethod)
    assert (again.triples, again.seed, again.reference) == (200, 1, "script")
    assert [curve["y"] for curve in entry["curves"]] == [curve.y for curve in chosen.curves]
    assert isinstance(build(record["process"], NoiseProcess), VPSDE)
    assert (tmp_path / "intervals.png").read_bytes()[1:4] == b"PNG"
    edges = "  ".join(f"{edge:g}" for edge in chosen.partition.edges)
    assert f"OptimalDenoiser  {edges}\n" in capsys.readouterr().out


def test_all_methods_stand_side_by_side_and_those_that_do_not_apply_are_left_out(tmp_path, capsys):
    chosen = select(every(), 4, COSINE, Given(normal(5, 1, 2, 2)), None, tmp_path)
    record = json.loads((tmp_path / "intervals.json").read_text())
    assert "edges" not in record
    assert list(record["methods"]) == [c.name for c in chosen] == ["UniformLength", "LogSNR"]
    assert set(record["left_out"]) == {
        "OptimalDenoiser", "GradientSimilarity", "AttentionConcentration"
    }  # fmt: skip
    text = capsys.readouterr().out
    assert "OptimalDenoiser         left out: OptimalDenoiser finds 3 intervals, not k = 4" in text


def test_every_method_takes_a_network_with_attention(tmp_path):
    methods = [
        UniformLength(),
        LogSNR(),
        OptimalDenoiser(triples=200),
        GradientSimilarity(images=2),
        AttentionConcentration(samples=2, steps=10),
    ]
    process = DiscreteVP(LinearBetas(1e-4, 0.9), T=20)
    data, bundle = Given(normal(40, 1, 8, 8)), bundle_of(Hump(20), process)
    bundle = Bundle(bundle.denoiser, bundle.manifest, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    chosen = select(methods, 3, process, data, bundle, tmp_path)
    assert [c.name for c in chosen] == [type(method).__name__ for method in every()]
    digest = hashlib.sha256(b"{}").hexdigest()
    named = {"folder": str(tmp_path), "manifest_sha256": digest}
    assert json.loads((tmp_path / "intervals.json").read_text())["bundle"] == named


def test_the_picture_shows_each_curve_over_its_intervals():
    layers = [Curve("y", str(i), [0.0, 1.0], [0.0, i]) for i in range(20)]
    mean = Curve("mean of y", "mean", [0.1, 0.9], [2.0, 3.0])
    chosen = [
        Selection(UniformLength(), Partition([0, 1])),
        Selection(LogSNR(), Partition([0, 0.3, 1]), [mean, *layers]),
    ]
    figure = selection_figure(chosen)
    assert [len(axes.lines) for axes in figure.axes] == [0, 1, 20]
    assert [axes.get_title("left") for axes in figure.axes] == [
        "UniformLength: 0  1", "LogSNR: 0  0.3  1", "LogSNR: 0  0.3  1"
    ]  # fmt: skip
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "mean of y", "y"]
    spans = [[patch.get_extents() for patch in axes.patches] for axes in figure.axes]
    for axes, boxes, edges in zip(figure.axes, spans, ([0, 1], [0, 0.3, 1], [0, 0.3, 1])):
        inside = axes.transData.inverted()
        drawn = [[inside.transform(corner)[0] for corner in box.get_points()] for box in boxes]
        assert np.allclose(drawn, list(zip(edges, edges[1:])))
    assert np.allclose(figure.axes[1].lines[0].get_xydata(), [[0.1, 2], [0.9, 3]])


def test_a_bundle_of_another_process_or_other_data_is_refused(tmp_path):
    bundle, data = bundle_of(Blocks((40,)), shape=(2,)), Given(normal(5, 2))
    with pytest.raises(ValueError, match="trained otherwise .*process.betas.class_path"):
        select([LogSNR()], 3, COSINE, data, bundle, tmp_path)
    with pytest.raises(ValueError, match=r"data shape: \[2\] != \[3\]"):
        select([LogSNR()], 3, SHORT, Given(normal(5, 3)), bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_any_choice(monkeypatch):
    monkeypatch.setattr(LogSNR, "__call__", lambda *_: pytest.fail("chosen"))
    with pytest.raises(Unusable, match="/dev/null/x cannot be written"):
        select([LogSNR()], 3, COSINE, Given(normal(5, 2)), None, Path("/dev/null/x"))


def test_no_method_and_one_method_twice_are_refused(tmp_path):
    for methods in ([], [LogSNR(), LogSNR()]):
        with pytest.raises(ValueError, match="at least one, and each of them once"):
            select(methods, 3, COSINE, Given(normal(5, 2)), None, tmp_path)
    with pytest.raises(ValueError, match="k = 0 intervals cannot be cut from 100 points"):
        select([LogSNR()], 0, COSINE, Given(normal(5, 2)), None, tmp_path)
    with pytest.raises(ValueError, match="no method applies: k = 0"):
        select([LogSNR(), UniformLength()], 0, COSINE, Given(normal(5, 2)), None, tmp_path)


def test_too_few_steps_for_one_choice_are_refused_before_any_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(config_verbs, "launch", lambda *_: pytest.fail("launched"))
    edges = {UniformLength(): [0, 0.5, 1], LogSNR(): [0, 0.01, 1]}
    found = [Selection(method, Partition(cut)) for method, cut in edges.items()]
    ours = SimpleNamespace(train=20, config=TINY[1::2])
    with pytest.raises(ValueError, match=r"20 study.iterations .* leave \[0, 20\] steps"):
        config_verbs.compare_choices(found, [], ours, tmp_path)
