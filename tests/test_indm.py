"""A flow in front of the diffusion: its map, the bound it is trained by, and the way back."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import kstest
from test_cli import refused
from test_continuous import Exact

from expertdiff.bundle import Bundle, Expert, check_together
from expertdiff.cli import main
from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.guidance import Discriminated, Guided
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import VESDE, VPSDE, CosineBetas, DiscreteVP, SubVPSDE
from expertdiff.diffusion.samplers import DDPM, Heun, SampleNoise
from expertdiff.diffusion.timesteps import Likelihood, Step
from expertdiff.discriminator import Discriminator
from expertdiff.evaluation.likelihood import log_likelihood
from expertdiff.experts.routed import RoutedExperts
from expertdiff.methods.base import Method
from expertdiff.methods.indm import INDM
from expertdiff.methods.single import Diffusion
from expertdiff.networks.flow import CouplingFlow, Flowed, of_flow
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.network import Network
from expertdiff.seeds import generator

PROCESSES = [VPSDE(), SubVPSDE(), VESDE()]
CONFIG = [
    f"--config={ROOT / path}" for path in ("configs/toys/indm.yaml", "tests/conf/toy.yaml")
] + [
    "--model.network.network.width=16", "--model.network.network.depth=1",
    "--model.network.flow.width=8", "--model.network.flow.depth=4", "--model.optimizer.lr=0.01",
]  # fmt: skip
QUICK = ["--trainer.callbacks=[LossByInterval]", "--trainer.val_check_interval=12"]
PLAIN = ["--model.prediction=Eps", "--model.weighting=Simple"]


def bent(depth=6, dim=2, seed=0) -> CouplingFlow:
    """A flow that is not the identity."""
    torch.manual_seed(seed)
    flow = CouplingFlow(depth, width=16, dim=dim)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow


def points(n=500, dim=2):
    return 2 * torch.randn(n, dim, generator=torch.Generator().manual_seed(1))


# -- the flow --------------------------------------------------------------------------------------


def test_a_fresh_flow_is_the_identity_bit_for_bit():
    x, flow = points(), CouplingFlow()
    z, log_det = flow(x)
    assert torch.equal(z, x) and torch.equal(log_det, torch.zeros(len(x)))
    assert torch.equal(flow.inverse(x), x)
    assert sum(p.numel() for p in flow.parameters()) > 0
    assert not [*CouplingFlow(depth=0).parameters()]


@pytest.mark.parametrize("dim", [2, 3])
def test_the_determinant_is_that_of_the_jacobian_and_the_way_back_exact(dim):
    flow, x = bent(dim=dim), points(dim=dim)
    z, log_det = flow(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: flow(row)[0]))(x)
    assert torch.allclose(log_det, jacobian.det().abs().log(), atol=1e-5)
    assert log_det.std() > 0.1 and (z - x).abs().mean() > 0.1
    assert (flow.inverse(z) - x).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow(x)[0], z) and (flow.inverse(z) - x).abs().max() < 1e-5


def test_refusals():
    with pytest.raises(ValueError, match="dim 1 at least 2"):
        CouplingFlow(dim=1)
    with pytest.raises(ValueError, match=r"2 dimensions cannot take items of shape \(3, 4, 2\)"):
        CouplingFlow()(torch.zeros(1, 3, 4, 2))
    with pytest.raises(ValueError, match="MLPDenoiser has no flow in front"):
        indm(MLPDenoiser(width=4, depth=1, T=1000), VPSDE())
    flowed = Flowed(MLPDenoiser(width=4, depth=1, T=100), bent())
    with pytest.raises(ValueError, match="Likelihood needs a process in continuous time"):
        indm(flowed, DiscreteVP(CosineBetas(), 100))
    guided = NetworkDenoiser(flowed, VPSDE(), Eps())
    with pytest.raises(ValueError, match="discriminator d knows noised data.*guide a model"):
        Discriminator.__call__(SimpleNamespace(path="d"), guided)


# -- the bound -------------------------------------------------------------------------------------


class Gaussian(Network):
    """The perfect network of data N(0, std^2) in each dimension."""

    def __init__(self, process: str, std: float = 1.0) -> None:
        super().__init__()
        self.exact = Exact(next(p for p in PROCESSES if type(p).__name__ == process), 0.0, std)

    def forward(self, x_t, t, y=None):
        return self.exact(x_t, t.double() / 999).eps


def indm(network, process, **options):
    return INDM(
        network=network, process=process, partition=Partition([0, 1]), **options
    )  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_t_have_the_density_and_the_weight_of_the_likelihood(process):
    g = generator("cpu", 0), generator("cpu", 1)
    t, weight = Likelihood().sample(20_000, Interval(), g[0], process, Step(g[1]))
    last, first = process.log_snr(torch.tensor([1.0, process.T_MIN]))
    u = (process.log_snr(t) - last) / (first - last)
    assert kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert torch.allclose(weight.double(), (first - last) / 2)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("stretch", [None, 0.7])
def test_the_loss_is_the_entropy_where_the_network_is_perfect(process, stretch, monkeypatch):
    """Of data N(0, 0.5^2), and of the same behind a flow that stretches them by e^0.7."""
    std, n = 0.5, 100_000
    flow = CouplingFlow(depth=0 if stretch is None else 2)
    method = indm(
        Flowed(Gaussian(type(process).__name__, std * math.exp(stretch or 0)), flow), process
    )
    for layer in method.network.flow.layers:  # the last layer's bias is (s, m)
        layer[-1].bias.data[0] = math.atanh(stretch)
    counts = {"accumulate_grad_batches": 1, "world_size": 1, "max_steps": 9}
    monkeypatch.setattr(Method, "trainer", SimpleNamespace(global_step=3, **counts))
    monkeypatch.setattr(Method, "global_rank", 0)
    x0 = std * torch.randn(n, 2, generator=generator("cpu", "data"))
    loss = method.training_step(Batch(x0, torch.zeros(n).long(), torch.arange(n)), 0)["loss"]
    entropy = math.log(std * math.sqrt(2 * math.pi * math.e))
    assert loss.item() == pytest.approx(entropy, abs=0.05)


# -- likelihood and samples ------------------------------------------------------------------------


class Behind(Exact):
    """The exact denoiser of z ~ N(mean, std^2), of which x lies before a flow."""

    flow = None

    def __init__(self, flow):
        super().__init__(VPSDE(), mean=0.2, std=0.6)
        self.before = flow

    flow = property(lambda self: self.before)


def test_the_likelihood_is_that_of_x_and_integrates_to_1():
    model, n = Behind(bent()), 80
    z = 0.2 + 0.6 * 5 * (2 * torch.rand(4000, 2) - 1)
    lo, hi = model.flow.inverse(z).aminmax(dim=0)
    axes = [torch.linspace(a, b, n) for a, b in zip(lo.tolist(), hi.tolist())]
    x = torch.cartesian_prod(*axes)
    bits = log_likelihood(model, x)
    cell = (hi - lo).prod().item() / (n - 1) ** 2
    assert (bits * math.log(2)).exp().sum().item() * cell == pytest.approx(1, abs=0.02)
    z, log_det = model.flow(x)
    law = torch.distributions.Normal(0.2, 0.6)
    expected = (law.log_prob(z).sum(1) + log_det) / math.log(2)
    likely = expected > -10
    assert (bits - expected)[likely].abs().max() < 0.05
    assert not torch.allclose(log_likelihood(Exact(VPSDE(), 0.2, 0.6), x), bits, atol=0.1)


def test_samples_are_mapped_back_once_whatever_is_around_the_denoiser():
    model, noise = Behind(bent()), SampleNoise(0, range(6), (2,), "cpu")
    sampler = Heun(steps=6, clip=False)
    z = sampler(Exact(VPSDE(), 0.2, 0.6), noise)
    x = model.flow.inverse(z)
    assert not torch.allclose(x, z, atol=0.05)
    logit = lambda x_t, t: 0 * x_t.sum(1)  # noqa: E731
    routed = RoutedExperts([model, Behind(bent())], Partition([0, 0.5, 1]))
    for around in (model, Discriminated(model, logit, 1.0), routed):
        assert torch.equal(sampler(around, noise), x)
        assert torch.equal(around.to_data(z), x) and around.flow is model.flow
    assert Guided(model, 0, 2.0, None).flow is model.flow
    *_, last = sampler.trajectory(model, noise)
    (again,) = sampler.trajectory(model, noise, start=last)
    assert torch.equal(again.x_t, x)


def test_experts_behind_different_flows_are_no_chain():
    with pytest.raises(ValueError, match="behind different flows cannot share a chain"):
        RoutedExperts([Behind(bent()), Behind(bent(seed=1))], Partition([0, 0.5, 1]))
    with pytest.raises(ValueError, match="behind different flows"):
        RoutedExperts([Behind(bent()), Exact(VPSDE())], Partition([0, 0.5, 1]))


# -- trained ---------------------------------------------------------------------------------------


class Plain(Diffusion):
    """A baseline under INDM's name, so that it draws the same random numbers."""

    job = "indm"


def fit(root, name, *options, seed=None) -> Expert:
    study = [f"--study.root={root}", f"--study.name={name}"]
    assert main(["fit", *CONFIG, *QUICK, *study, *options]) == 0
    (folder,) = (root / name).iterdir()
    return Expert.read(folder, seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(root) -> Expert:
    return fit(root, "indm", "--trainer.callbacks+=DenoisingGrid")


def test_flow_and_network_are_trained_together(root, trained):
    learned = of_flow(trained.weights)
    assert len(learned) == 4 * 6
    assert all(value.abs().max() > 0 for value in learned.values())
    assert trained.identity["job"] == "indm"
    assert (root / "indm/indm/grids/step-00000012.png").is_file()


def test_an_identity_flow_is_the_plain_program_bit_for_bit(root):
    ours = fit(root, "identity", "--model.network.flow.depth=0").weights
    plain = ["--model=test_indm.Plain", *PLAIN, "--model.timesteps=Likelihood"]
    network = ["--model.network=MLPDenoiser", "--model.network.T=1000",
               "--model.network.width=16", "--model.network.depth=1"]  # fmt: skip
    theirs = fit(root, "plain", *plain, *network).weights
    assert {f"network.{key}" for key in theirs} == ours.keys()
    assert all(torch.equal(ours[f"network.{key}"], value) for key, value in theirs.items())


def test_a_seed_in_a_stack_is_the_seed_alone_and_halves_are_the_whole(root, trained):
    schedule = "--model.lr_scheduler.T_max=12"
    fit(root, "halves", "--trainer.max_steps=6", schedule)
    halves = fit(root, "halves", schedule)
    assert all(torch.equal(halves.weights[key], trained.weights[key]) for key in trained.weights)
    stacked = fit(root, "stack", "--model.seeds=[4,0]", seed=0)
    for key, value in trained.weights.items():
        assert torch.allclose(stacked.weights[key], value, atol=1e-4), key


def expert(root, i, start) -> Expert:
    options = ["--model=MDM", *PLAIN, "--model.timesteps=Uniform", f"--model.expert={i}",
               "--model.partition.edges=[0,0.3,1]", f"--model.init_from={start}"]  # fmt: skip
    return fit(root, f"expert-{i}-of-{start.parent.name}", *options)


def test_experts_of_one_flow_are_stitched_and_drawn_from(root, trained):
    parts = [expert(root, i, root / "indm/indm") for i in (0, 1)]
    for part in parts:
        for key, value in part.weights.items():
            assert torch.equal(value, trained.weights[key]) == key.startswith("flow.")
    names = [str(part.path) for part in parts]
    assert main(["stitch", *names, f"--output={root}/bundle"]) == 0
    sample = ["sample", f"{root}/bundle", "--sampler=DDPM", "--sampler.steps=8",
              "--sampler.clip=false", "--samples=30"]  # fmt: skip
    for lazy in ("false", "true"):
        assert main([*sample, f"--lazy={lazy}", f"--output={root}/{lazy}"]) == 0
    drawn, slowly = (
        np.loadtxt(root / lazy / "samples.csv", delimiter=",", skiprows=1)
        for lazy in ("false", "true")
    )
    bundle = Bundle.load(root / "bundle")
    networks = [e.network.network for e in bundle.denoiser.experts]
    bare = [NetworkDenoiser(n, bundle.denoiser.process, Eps()) for n in networks]
    noise = SampleNoise(0, range(30), (2,), "cpu")
    z = DDPM(8, clip=False)(RoutedExperts(bare, bundle.partition), noise)
    expected = bundle.denoiser.flow.inverse(z).numpy()
    assert np.allclose(drawn, expected, atol=1e-5) and (drawn == slowly).all()
    assert not np.allclose(drawn, z.numpy(), atol=1e-3)

    bent = {key: value + key.startswith("flow.") for key, value in parts[1].weights.items()}
    with pytest.raises(ValueError, match="behind different flows: start both from the same run"):
        check_together([parts[0], replace(parts[1], weights=bent)])


def test_images_have_no_flow(tmp_path, capsys):
    error = refused(capsys, "fit", *CONFIG, f"--study.root={tmp_path}", "--data=Digits")
    assert "a flow of points of 2 dimensions cannot take items of shape (1, 8, 8)" in error
