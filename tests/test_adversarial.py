"""Training against a critic: whose gradient holds what, what rests at strength 0, and CAS."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from lightning.pytorch import Callback
from test_ranks import TWO, expertdiff
from test_training import assert_equal
from torch import nn

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, Expert
from expertdiff.checkpoints import AVERAGED, RAW
from expertdiff.cli import main
from expertdiff.data import Toy2D
from expertdiff.data.base import Batch
from expertdiff.data.densities import Gaussians
from expertdiff.data.images import Digits
from expertdiff.diffusion.denoiser import X0, Eps, NetworkDenoiser
from expertdiff.diffusion.exact import ExactDenoiser, Mixture
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import VESDE, VPSDE, CosineBetas, DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import CAS, DDIM, SampleNoise
from expertdiff.diffusion.timesteps import OneForAll, Step, Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.methods.adversarial import ConsistentAdversarial, StructureGuided, relations
from expertdiff.methods.single import Diffusion
from expertdiff.networks.encoder import ImageLogit
from expertdiff.networks.flow import CouplingFlow, Flowed
from expertdiff.networks.mlp import MLPDenoiser, MLPLogit
from expertdiff.networks.network import Network
from expertdiff.seeds import generator

CHAIN = DiscreteVP(CosineBetas(), 100)
MEAN, STD = (0.5, -1.0), (1.0, 0.5)
PROCESSES = pytest.mark.parametrize(
    "process", [CHAIN, VPSDE(), VESDE()], ids=lambda p: type(p).__name__
)


def method(cls, **replaced):
    """A method on a batch of points, as a trainer would hold it."""
    structured = cls is StructureGuided
    parts = {
        "network": MLPDenoiser(width=8, depth=1),
        "process": CHAIN,
        "prediction": Eps(),
        "timesteps": OneForAll() if structured else Uniform(),
        "weighting": Simple(),
        "partition": Partition([0, 1]),
    }
    if cls is not Diffusion:
        parts |= {"critic": MLPLogit(width=8, depth=1, outputs=3 if structured else 1)}
        parts |= {"strength": 0.7}
    module = cls(**parts | replaced)
    module._trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1, max_steps=9,
        datamodule=Toy2D(Gaussians()),
    )  # fmt: skip
    if cls is ConsistentAdversarial and "critic" not in replaced:  # a fresh one says 0 of all
        nn.init.normal_(module.critic.network[-1].weight)
    return module


def batch(n=16):
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Batch(x0, torch.zeros(n).long(), torch.arange(n))


def gradients(loss, module):
    """Of the network and of the critic; ``None`` where a loss does not depend on a weight."""
    parts = [list(part.parameters()) for part in (module.network, module.critic)]
    found = torch.autograd.grad(loss, sum(parts, []), retain_graph=True, allow_unused=True)
    return found[: len(parts[0])], found[len(parts[0]) :]


def seen(module, b):
    """x0, the predicted x0, and t of the first step."""
    t, _, eps = module._draw(b.x0, 0, (module.job, 0, 0))
    return b.x0, module.denoiser(CHAIN.add_noise(b.x0, eps, t), t).x0, t


both = pytest.mark.parametrize("cls", [ConsistentAdversarial, StructureGuided])


# -- two players, one backward pass ----------------------------------------------------------------


@both
def test_each_player_s_gradient_is_of_its_own_loss(cls):
    module, b = method(cls), batch()
    ours = gradients(module.training_step(b, 0)["loss"], module)
    plain = method(Diffusion, timesteps=module.timesteps)
    mse = plain.training_step(b, 0)["loss"]
    x0, x0_hat, t = seen(module, b)

    def critic(x):
        return module.judged({}, x)

    against = gradients(module.network_loss(critic, x0, x0_hat, t).sum(), module)
    assert any(g.any() for g in against[1])  # which must not be there
    for g, a, m in zip(ours[0], against[0], torch.autograd.grad(mse, plain.network.parameters())):
        torch.testing.assert_close(g, m + 0.7 * a)
    own = gradients(module.critic_loss(critic, x0, x0_hat, t).sum(), module)
    assert any(g.any() for g in own[0] if g is not None)  # which must not be there
    for g, o in zip(ours[1], own[1]):
        torch.testing.assert_close(g, o)


@both
def test_a_step_is_that_of_two_optimizers(cls):
    module, apart, b = method(cls), method(cls), batch()
    apart.load_state_dict(module.state_dict())
    together = torch.optim.AdamW(module.parameter_groups(), lr=1e-2)
    for _ in range(3):
        together.zero_grad()
        module.training_step(b, 0)["loss"].backward()
        together.step()
    network = torch.optim.AdamW(apart.network.parameters(), lr=1e-2)
    betas = (0.9, 0.999) if cls is StructureGuided else (0.0, 0.9)
    critic = torch.optim.Adam(apart.critic.parameters(), lr=1e-4, betas=betas)
    for _ in range(3):
        # in turn, each with the other as it was
        loss = apart.training_step(b, 0)["loss"]
        found = gradients(loss, apart)
        for part, optimizer, grads in zip((apart.network, apart.critic), (network, critic), found):
            for p, g in zip(part.parameters(), grads):
                p.grad = g
            optimizer.step()
    assert_equal([module.state_dict()], [apart.state_dict()])


def test_only_the_network_is_clipped():
    module = method(ConsistentAdversarial)
    module._trainer.precision = "32-true"
    module.training_step(batch(), 0)["loss"].backward()
    before = [p.grad.clone() for p in module.critic.parameters()]
    optimizer = torch.optim.AdamW(module.parameter_groups())
    module.configure_gradient_clipping(optimizer, 1e-3, None)
    norm = torch.stack([p.grad.norm() for p in module.network.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    module._trainer.precision = "16-mixed"  # where gradients are unscaled by now
    module.configure_gradient_clipping(optimizer, 1e-4, "norm")
    norm = torch.stack([p.grad.norm() for p in module.network.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-4, rel=1e-2)
    for p, g in zip(module.critic.parameters(), before):
        assert torch.equal(p.grad, g)


def test_a_fused_optimizer_in_float16_is_not_clipped():
    module = method(Diffusion, optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    refused = {
        **vars(module._trainer), "precision": "16-mixed", "gradient_clip_val": 1.0,
        "strategy": SimpleNamespace(root_device=torch.device("cpu")), "is_global_zero": True,
    }  # fmt: skip
    module._trainer = SimpleNamespace(**refused)
    with pytest.raises(ValueError, match="in 16-mixed with a fused AdamW"):
        module.setup("fit")
    for change in ({"precision": "bf16-mixed"}, {"gradient_clip_val": None}):
        module._trainer = SimpleNamespace(**refused | change)
        module.setup("fit")


@both
def test_a_seed_in_a_stack_is_the_seed_alone(cls):
    stacked, b = method(cls, seeds=[4, 7]), batch()
    doubled = Batch(*(torch.cat([part, part]) for part in b))
    for i, seed in enumerate((4, 7)):
        alone = method(cls, seed=seed)
        member = {name: weight[i] for name, weight in stacked.critic.state_dict().items()}
        alone.critic.load_state_dict(member)
        if cls is StructureGuided:  # which is not drawn anew by `method`
            fresh = method(cls, seed=seed).critic.state_dict()
            assert_equal([member], [fresh])
        ours = gradients(stacked.training_step(doubled, 0)["loss"], stacked)
        theirs = gradients(alone.training_step(b, 0)["loss"], alone)
        for part, other in zip(ours, theirs):
            for g, o in zip(part, other):
                torch.testing.assert_close(g[i], o, rtol=1e-3, atol=1e-5)


# -- the losses ------------------------------------------------------------------------------------


def test_consistent_adversarial_is_least_squares_of_real_and_predicted():
    module = method(ConsistentAdversarial)

    def critic(x):
        return x.sum(1).reshape(1, -1, 1)

    x0, x0_hat = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0], [2.0, 1.0]])
    assert module.network_loss(critic, x0, x0_hat, None).tolist() == [(4 + 4) / 2]
    assert module.critic_loss(critic, x0, x0_hat, None).tolist() == [(1 + 0) / 2 + (0 + 16) / 2]


class Posterior(Network):
    """The best eps for data with independent normal values."""

    def __init__(self, process=CHAIN):
        super().__init__()
        self.process, self.none = process, nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, y=None):
        t = t / 999 if self.process is not CHAIN else t  # what networks are told of t
        alpha, sigma = (c.float()[:, None] for c in self.process.alpha_sigma(t))
        mean, variance = torch.tensor(MEAN), torch.tensor(STD).square()
        return sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2) + self.none


def normal(process=CHAIN):
    mixture = Mixture(torch.tensor([MEAN]), torch.ones(1), torch.tensor(STD))
    return ExactDenoiser(mixture, process)


@PROCESSES
def test_what_the_critic_sees_of_normal_data_is_the_posterior_mean(process, monkeypatch):
    module, b = method(ConsistentAdversarial, process=process), batch(64)
    module.denoiser = NetworkDenoiser(Posterior(process), process, Eps())
    t = process.times(torch.linspace(0.1, 0.9, 64), Interval())
    x_t = process.add_noise(b.x0, torch.randn(64, 2), t)
    shown = []
    monkeypatch.setattr(
        module, "judged", lambda weights, x: shown.append(x) or x.reshape(1, len(x), -1)
    )
    module.regularised(b, module.denoiser(x_t, t), t)
    assert torch.equal(shown[1], b.x0)
    for predicted in (shown[0], shown[2]):
        torch.testing.assert_close(predicted, normal(process)(x_t, t).x0, rtol=1e-3, atol=1e-3)
    assert shown[0].requires_grad and not shown[2].requires_grad


def test_predicted_images_are_clamped_to_where_data_lie(monkeypatch):
    module, shown = method(ConsistentAdversarial, prediction=X0()), []
    monkeypatch.setattr(module, "judged", lambda weights, x: shown.append(x) or x.reshape(1, -1, 1))
    prediction = SimpleNamespace(x0=torch.tensor([[-3.0, 0.5]]))
    for data, expected in ((Digits(), [[-1.0, 0.5]]), (Toy2D(Gaussians()), [[-3.0, 0.5]])):
        module._trainer.datamodule = data
        module.regularised(Batch(torch.zeros(1, 2), None, None), prediction, None)
        assert shown[-1].tolist() == expected


def structure(module, x0, x0_hat, critic=None, t=30):
    t = torch.full((len(x0),), t)
    return module.network_loss(critic or (lambda x: module.judged({}, x)), x0, x0_hat, t)


def identity(x):
    return x[None]


def test_structure_of_perfect_predictions_is_0_with_a_gradient_of_0():
    module = method(StructureGuided)
    x0 = torch.cat([batch().x0, batch(2).x0])  # with items that are equal
    x0_hat = x0.clone().requires_grad_()
    loss = structure(module, x0, x0_hat)
    loss.sum().backward()
    assert loss.item() == 0 and not x0_hat.grad.any()
    wrong = (x0 + 0.1 * torch.randn(x0.shape)).requires_grad_()
    structure(module, x0, wrong).sum().backward()
    assert wrong.grad.isfinite().all() and wrong.grad.any()


def test_structure_does_not_depend_on_order_or_under_identity_on_direction():
    module, x0 = method(StructureGuided), batch().x0
    x0_hat, order = x0 + 0.3 * torch.randn(x0.shape), torch.randperm(len(x0))
    loss = structure(module, x0, x0_hat)
    torch.testing.assert_close(structure(module, x0[order], x0_hat[order]), loss)
    angle = torch.tensor(1.1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    loss = structure(module, x0, x0_hat, identity)
    torch.testing.assert_close(structure(module, x0 @ turn, x0_hat @ turn, identity), loss)
    torch.testing.assert_close(structure(module, x0, x0_hat @ turn, identity), loss)
    assert not torch.allclose(structure(module, x0, x0_hat * torch.tensor([1, 2]), identity), loss)


def test_structure_is_a_mean_square_that_weighs_as_errors_of_x0_do():
    module, x0 = method(StructureGuided), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    x0_hat = torch.tensor([[1.0, 0.0], [5.0, 0.0]])  # which lie alike
    snr = CHAIN.snr(torch.tensor([30])).item()
    expected = 2 * (math.sqrt(2 + 1e-8) - 1e-4) ** 2 / 4
    assert structure(module, x0, x0_hat, identity).item() == pytest.approx(snr * expected)
    assert relations(identity(x0))[0, 0].tolist() == pytest.approx([1e-4, math.sqrt(2)])


def test_one_t_for_all_is_uniform():
    draws = [
        OneForAll().sample(3, Interval(0.1, 0.8), generator("cpu", i), CHAIN, Step(None))
        for i in range(500)
    ]
    t = torch.stack([t for t, _ in draws])
    assert (t == t[:, :1]).all() and (draws[0][1] == 1).all()
    assert t.min() == 10 and t.max() == 79
    assert (t[:, 0].float().mean() - 44.5).abs() < 4 * 70 / math.sqrt(12 * 500)


# -- trained ---------------------------------------------------------------------------------------

CRITIC = ["--model.critic=MLPLogit", "--model.critic.width=8", "--model.critic.depth=1"]
STRUCTURE = [*CRITIC, "--model.critic.outputs=3", "--model.timesteps=OneForAll"]
VARIANTS = {
    "ConsistentAdversarial": [*CRITIC, "--model.strength=1", "--model.critic_lr=0.01"],
    "StructureGuided": [*STRUCTURE, "--model.strength=1", "--model.critic_lr=0.01"],
}


def points(root, name, model, *options):
    """The options of a fit of the moons that a test has time for."""
    configs = (ROOT / "configs/toys/mdm.yaml", ROOT / "tests/conf/toy.yaml")
    return [
        "fit", *(f"--config={path}" for path in configs), f"--study.root={root}",
        f"--study.name={name}", f"--model={model}", "--model.network.width=8",
        "--model.network.depth=1", "--model.lr_scheduler.T_max=12",
        "--trainer.callbacks=[LossByInterval]", "--trainer.limit_val_batches=0", *options,
    ]  # fmt: skip


def content(root, name):
    return checkpoints.load(checkpoints.newest(root / name / "baseline" / "checkpoints"))


def critic_of(weights):
    return {key: value for key, value in weights.items() if key.startswith("critic.")}


def test_resumes_with_the_same_bits_and_keeps_the_critic_apart(tmp_path):
    whole, halves = (
        points(tmp_path, name, "StructureGuided", *VARIANTS["StructureGuided"]) for name in "wh"
    )
    assert main(whole) == 0
    assert main([*halves, "--trainer.max_steps=6"]) == 0
    assert main(halves) == 0
    one, two = (content(tmp_path, name) for name in "wh")
    for kind in (AVERAGED, RAW):
        assert_equal([one[kind]], [two[kind]])
    raw, averaged = critic_of(one[RAW]), critic_of(one[AVERAGED])
    assert_equal([raw], [averaged])
    assert any(not torch.equal(one[RAW][key], one[AVERAGED][key]) for key in one[RAW])
    first = method(StructureGuided)
    assert all(not torch.equal(raw[key], v) for key, v in critic_of(first.state_dict()).items())
    first.load_state_dict(one[AVERAGED])  # the critic in it, and nothing else
    job = tmp_path / "w" / "baseline"
    assert not any("critic" in key for key in Expert.read(job).weights)
    Bundle.stitch([job], tmp_path / "bundle")


@pytest.mark.parametrize("model", VARIANTS)
def test_at_strength_0_it_is_the_plain_program(model, tmp_path):
    plain = ["--model.timesteps=OneForAll"] if model == "StructureGuided" else []
    assert main(points(tmp_path, "plain", "Diffusion", *plain)) == 0
    assert main(points(tmp_path, "off", model, *VARIANTS[model], "--model.strength=0")) == 0
    off, plain = content(tmp_path, "off"), content(tmp_path, "plain")
    for kind in (AVERAGED, RAW):
        rest = {key: v for key, v in off[kind].items() if not key.startswith("critic.")}
        assert_equal([rest], [plain[kind]])


@both
@pytest.mark.parametrize("rests", [{"strength": 0}, {"critic_lr": 0}], ids=str)
def test_a_critic_that_rests_is_not_trained(cls, rests):
    module = method(cls, **rests)
    (group,) = module.parameter_groups()
    assert len(group["params"]) == len(list(module.network.parameters()))
    module.training_step(batch(), 0)["loss"].backward()
    assert all(p.grad is None for p in module.critic.parameters())
    assert all(p.grad is not None for p in module.network.parameters())


def test_images_with_the_shipped_config(tmp_path):
    options = [
        *TINY, "--config", str(ROOT / "configs/digits/adversarial.yaml"),
        f"--study.root={tmp_path}", "--study.name=tiny", "--study.iterations=4",
        "--model.critic.model_channels=8", "--trainer.callbacks=[LossByInterval]",
    ]  # fmt: skip
    assert main(["fit", *options]) == 0
    assert main(["stitch", f"{tmp_path}/tiny/baseline", f"--output={tmp_path}/bundle"]) == 0
    drawn = ["--samples=4", f"--output={tmp_path}/drawn", "--sampler=CAS", "--sampler.steps=40"]
    assert main(["sample", f"{tmp_path}/bundle", *drawn]) == 0


class Alike(Callback):
    """Each rank writes down its weights."""

    def on_train_end(self, trainer, pl_module):
        digests = {name: p.double().sum().item() for name, p in pl_module.named_parameters()}
        path = Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.json"
        path.write_text(json.dumps(digests))


def test_two_ranks_train_one_critic(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    options = points(tmp_path, "two", "StructureGuided", *VARIANTS["StructureGuided"], *TWO)
    expertdiff(*options, "--trainer.callbacks+=test_adversarial.Alike")
    folder = tmp_path / "two" / "baseline"
    assert json.loads((folder / "done.json").read_text())["devices"] == 2
    alike = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert alike[0] == alike[1]
    first = method(StructureGuided).critic.network[0].weight.double().sum().item()
    assert alike[0]["critic.network.0.weight"] != first


# -- consistent annealed sampling ------------------------------------------------------------------


def gamma_of(process, steps):
    first, last = process.snr(process.visited(2)).log().tolist()
    return math.exp((first - last) / (2 * (steps - 1)))


@pytest.mark.parametrize(
    "process", [DiscreteVP(LinearBetas()), VPSDE(), VESDE()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("times", [1.1, 3])
def test_cas_draws_normal_data_right(process, times):
    eta = times * (1 - gamma_of(process, 120))
    noise = SampleNoise(0, range(1000), (2,), "cpu")
    samples = CAS(120, eta, clip=False)(normal(process), noise)
    error = (samples.mean(0) - torch.tensor(MEAN)).abs() / torch.tensor(STD)
    assert error.max() < 0.12
    assert (samples.std(0) / torch.tensor(STD) - 1).abs().max() < 0.1
    narrow = CAS(120, 0.9, clip=False)(normal(process), noise)
    assert (narrow.std(0) / torch.tensor(STD)).max() < 0.8


@PROCESSES
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.2])
def test_cas_keeps_the_noise_level_of_each_point_for_one_datum(process, eta):
    datum = Mixture(torch.tensor([MEAN]), torch.ones(1), torch.zeros(2))
    noise = SampleNoise(0, range(1000), (2,), "cpu")
    sampler = CAS(20, eta, clip=False)
    *states, last = sampler.trajectory(ExactDenoiser(datum, process), noise)
    alpha, sigma = (c.float() for c in process.alpha_sigma(sampler.visited(process)))
    for state, a, s in zip(states[1:], alpha[1:], sigma[1:]):
        excess = (state.x_t - a * torch.tensor(MEAN)) / s
        assert (excess.std() - 1).abs() < 0.06 and excess.mean().abs() < 0.08
    torch.testing.assert_close(last.x_t, torch.tensor(MEAN).expand(1000, 2))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_cas_is_ddim_of_a_constant_eta(eta, monkeypatch):
    process, steps = VPSDE(), 40
    gamma = gamma_of(process, steps)
    kept = gamma * math.sqrt(1 - eta**2 * (1 - gamma**2))
    cas = CAS(steps, None if eta == 1 else 1 - kept + 1e-12, clip=False)
    sigma = process.snr(cas.visited(process)).rsqrt()
    assert torch.allclose(sigma[1:] / sigma[:-1], torch.tensor(gamma).double(), rtol=1e-6)
    ddim = DDIM(steps, eta, clip=False)
    monkeypatch.setattr(ddim, "visited", cas.visited)
    noise = SampleNoise(0, range(50), (2,), "cpu")
    ours, theirs = cas(normal(process), noise), ddim(normal(process), noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_cas_visits_each_timestep_once():
    t = CAS(90).visited(CHAIN)
    assert t[0] == 99 and t[-1] == 0 and (t.diff() < 0).all() and len(t) < 90
    assert CAS(90).calls(CHAIN).tolist() == t.tolist()


# -- refusals --------------------------------------------------------------------------------------


FLOWED = {"network": Flowed(MLPDenoiser(width=8, depth=1), CouplingFlow(depth=2))}


@pytest.mark.parametrize(
    "cls, replaced, said",
    [
        (ConsistentAdversarial, {"strength": -1}, "must not be negative"),
        (ConsistentAdversarial, {"critic_lr": -1.0}, "must not be negative"),
        (
            ConsistentAdversarial,
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
            "SGD has no betas for the critic: use Adam or AdamW",
        ),
        (
            ConsistentAdversarial,
            {"critic": ImageLogit(8, 1), "seeds": [0, 1]},
            "ImageLogit cannot be trained stacked",
        ),
        (StructureGuided, {"timesteps": Uniform()}, "use OneForAll timesteps"),
        (ConsistentAdversarial, FLOWED, "train a network without a flow"),
        (StructureGuided, FLOWED, "train a network without a flow"),
    ],
)
def test_refusals(cls, replaced, said):
    with pytest.raises(ValueError, match=said):
        method(cls, **replaced)


def test_refuses_a_critic_of_other_data():
    images = method(ConsistentAdversarial, critic=ImageLogit(8, 1))
    with pytest.raises(ValueError, match=r"critic cannot take data of shape \(2,\): "):
        images._outputs()
    one = method(StructureGuided, critic=MLPLogit(width=8))
    with pytest.raises(ValueError, match="give model.critic more outputs"):
        one._outputs()
    assert method(StructureGuided, seeds=[0, 1])._outputs() == 3


def test_cas_refuses_steps_that_it_cannot_take():
    with pytest.raises(ValueError, match="steps 1 make no geometric progression"):
        CAS(1)
    with pytest.raises(ValueError, match=r"eta 0.01 must be in \(0\.\d+, 1\.\d+\) with 20 steps"):
        CAS(20, 0.01).calls(CHAIN)
