"""Gated experts, their extra losses, and seeds trained side by side."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from expertdiff.bundle import Bundle, Expert
from expertdiff.callbacks.ema import EMA
from expertdiff.cli import main
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.timesteps import CleanBiased, Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.experts.gated import GatedExperts, Sigmoid, Softmax, Top1
from expertdiff.experts.stacked import StackedDenoiser, stack
from expertdiff.methods.dualdiff import DualDiff, mean_distance
from expertdiff.metrics import read_metrics
from expertdiff.networks.mlp import MLPDenoiser

CONFIG = str(Path(__file__).parents[1] / "configs/toys/dualdiff.yaml")
PROCESS = DiscreteVP(LinearBetas(), T=100)


def inputs(n=64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=g) * 2, torch.randint(100, (n,), generator=g)


def method(network, **kwargs):
    return DualDiff(
        network=network, process=PROCESS, prediction=Eps(), timesteps=Uniform(),
        weighting=Simple(), partition=Partition([0, 1]), **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "network, parameters",
    [
        (MLPDenoiser(), 296_450),
        (GatedExperts(), 691_717),
        (GatedExperts(gating=[256, 128]), 724_485),
        (GatedExperts(gating=[256, 128], head=128), 789_765),
        (MLPDenoiser(420), 693_002),
        (MLPDenoiser(431), 725_375),
        (MLPDenoiser(452), 789_194),
    ],
)
def test_the_published_configurations_to_the_parameter(network, parameters):
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_upstream_weights_are_a_rename_away():
    keys = set(GatedExperts(gating=[256, 128], head=128).state_dict())
    assert {f"gating_network.{i}.weight" for i in (0, 2, 4)} < keys
    assert {f"experts.1.{part}.weight" for part in ("0", "1.ff", "3.ff", "5", "7")} < keys
    assert "network.5.bias" in MLPDenoiser().state_dict()


def test_t_is_stretched_to_the_published_hundred_steps():
    long, short = MLPDenoiser(T=1000), MLPDenoiser(T=100)
    long.load_state_dict(short.state_dict())
    x, t = inputs()
    assert torch.allclose(short(x, t), long(x, 10 * t), atol=1e-5)


@pytest.mark.parametrize("gate", [Sigmoid(), Softmax(), Top1(), Softmax(0.1)])
def test_weights_are_a_convex_combination(gate):
    x, t = inputs()
    _, weights = GatedExperts(gate=gate).blended(x, t)
    assert weights.shape == (64, 2)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert torch.allclose(weights.sum(-1), torch.ones(64))


def test_the_top_gate_picks_and_still_learns():
    network = GatedExperts(experts=3, gate=Top1())
    output, weights = network.blended(*inputs())
    assert set(weights.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    output.square().mean().backward()
    assert network.gating_network[0].weight.grad.abs().sum() > 0


def test_a_cold_gate_is_sharper():
    x, t = inputs()
    network = GatedExperts()
    soft = network.blended(x, t)[1]
    network.gate = Sigmoid(temperature=0.01)
    hard = network.blended(x, t)[1]
    assert ((hard - 0.5).abs() > (soft - 0.5).abs()).all()


@pytest.mark.parametrize("experts", [2, 4])
def test_gradients_reach_the_gate_and_every_expert(experts):
    network = GatedExperts(experts)
    NetworkDenoiser(network, PROCESS, Eps())(*inputs()).eps.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_swapped_experts_with_a_mirrored_gate_are_the_same_model():
    network, swapped = GatedExperts(), GatedExperts()
    weights = network.state_dict()
    mirrored = {
        key.replace("experts.0", "experts.x").replace("experts.1", "experts.0").replace(
            "experts.x", "experts.1"
        ): -value if key.startswith("gating_network.2") else value
        for key, value in weights.items()
    }  # fmt: skip
    swapped.load_state_dict(mirrored)
    assert torch.allclose(network(*inputs()), swapped(*inputs()), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="1 expert has nothing to blend"):
        GatedExperts(experts=1)
    with pytest.raises(ValueError, match="Sigmoid gate blends 2 experts, not 3"):
        GatedExperts(experts=3, gate=Sigmoid())
    with pytest.raises(ValueError, match="temperature 0 must be positive"):
        Softmax(temperature=0)
    with pytest.raises(ValueError, match="MLPDenoiser has no gate for balance"):
        method(MLPDenoiser(), balance=0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        method(GatedExperts(), diversity=-0.1)
    with pytest.raises(ValueError, match=r"seeds \[1, 1\]"):
        method(GatedExperts(), seeds=[1, 1])


class TestDiversity:
    def test_two_rows_at_distance_a_give_half_of_it(self):
        x = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
        assert mean_distance(x).item() == pytest.approx(2.5)

    def test_equal_rows_give_nothing_and_a_finite_gradient(self):
        x = torch.ones(1, 8, 2, requires_grad=True)
        mean_distance(x).sum().backward()
        assert mean_distance(x).item() == 0
        assert x.grad.isfinite().all()

    def test_it_is_subtracted_for_each_seed(self):
        x, t = inputs()
        stacked = method(GatedExperts(), diversity=0.1, seeds=[0, 1])
        prediction = stacked.denoiser(x, t)
        pairs = [
            torch.stack([(a - b).norm() for a in half for b in half]).mean()
            for half in prediction.eps.chunk(2)
        ]
        assert torch.allclose(stacked.regularised(None, prediction, t), -0.1 * torch.stack(pairs))


@pytest.mark.parametrize("bias, expected", [(0.0, 0.0), (50.0, 1.0)])
def test_balance_is_0_for_equal_shares_and_1_for_one_of_two(bias, expected):
    network = GatedExperts()
    balanced = method(network, balance=2.0)
    last = balanced.network.gating_network[-1]
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, bias)
    prediction = balanced.denoiser(*inputs())
    assert balanced.regularised(None, prediction, None).item() == pytest.approx(
        2 * expected, abs=1e-5
    )


class TestStack:
    def test_each_network_sees_its_own_rows(self):
        networks = [GatedExperts() for _ in range(3)]
        x, t = inputs(60)
        together = StackedDenoiser(networks, PROCESS, Eps())(x, t).eps
        alone = [
            NetworkDenoiser(n, PROCESS, Eps())(*rows).eps
            for n, *rows in zip(networks, x.chunk(3), t.chunk(3))
        ]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)

    def test_gradients_are_clipped_as_if_alone(self):
        networks = [MLPDenoiser(width=32, depth=1) for _ in range(2)]
        with torch.no_grad():
            for p in networks[1].parameters():
                p.mul_(3)
        alone = [NetworkDenoiser(n, PROCESS, Eps()) for n in networks]
        together = StackedDenoiser(networks, PROCESS, Eps())
        x, t = inputs()
        target = torch.randn(64, 2)
        (together(x, t).eps - target).square().unflatten(0, (2, -1)).mean((1, 2)).sum().backward()
        together.clip_gradients(0.5)
        for i, (one, rows) in enumerate(zip(alone, zip(*(v.chunk(2) for v in (x, t, target))))):
            (one(*rows[:2]).eps - rows[2]).square().mean().backward()
            one.clip_gradients(0.5)
            for p, q in zip(one.parameters(), together.parameters()):
                assert torch.allclose(p.grad, q.grad[i], atol=1e-5)

    def test_only_linear_layers_can_be_stacked(self):
        class Odd(MLPDenoiser):
            def __init__(self):
                super().__init__(width=8, depth=1)
                self.gain = nn.Parameter(torch.ones(()))

        with pytest.raises(ValueError, match="Odd cannot be trained stacked, because gain"):
            stack([Odd(), Odd()])

    def test_a_seed_in_a_stack_is_the_seed_alone(self, tmp_path):
        def fit(name, *options):
            return main([
                "fit", "--config", CONFIG, f"--study.root={tmp_path}", f"--study.name={name}",
                "--study.iterations=20", "--trainer.precision=32-true", "--data.batch_size=32",
                "--data.samples=200", "--data.validation_samples=50", "--trainer.accelerator=cpu",
                "--trainer.logger=JsonLines", "--trainer.callbacks=[LossByInterval]",
                "--trainer.enable_progress_bar=false", "--model.diversity=0.05", *options,
            ])  # fmt: skip

        assert fit("stack", "--model.seeds=[4,7]") == 0
        assert fit("alone", "--seed_everything=7") == 0
        together, alone = (tmp_path / name / "dualdiff" for name in ("stack", "alone"))
        ours, theirs = Expert.read(together, seed=7), Expert.read(alone)
        assert ours.identity["seeds"] == theirs.identity["seeds"] == [7]
        for key, value in theirs.weights.items():
            assert torch.allclose(ours.weights[key], value, atol=1e-5), key
        with pytest.raises(ValueError, match=r"seeds \[4, 7\] side by side, not 5"):
            Expert.read(together, seed=5)
        bundle = Bundle.stitch([together], tmp_path / "bundle", seed=4)
        assert not torch.allclose(
            bundle.denoiser.network.experts[0][0].weight, theirs.weights["experts.0.0.weight"]
        )
        losses = [line["train/loss"] for line in read_metrics(together / "metrics.jsonl")
                  if "train/loss" in line]  # fmt: skip
        assert all(0 < loss < 1.5 for loss in losses)  # a mean over seeds, not their sum


@pytest.mark.parametrize(
    "s, decay", [(100, 0), (110, 0), (120, 1 - 21 ** (-2 / 3)), (2920, 0.99499), (2930, 0.995)]
)
def test_the_average_is_upstreams(s, decay):
    average = EMA(0.995, every=10, power=2 / 3)
    assert average.decay_at(s + 1) == pytest.approx(decay, abs=1e-5)


def test_half_of_a_biased_draw_lies_in_the_clean_part():
    sampler, g = CleanBiased(share=0.5, into=0.2), torch.Generator().manual_seed(0)
    t, weight = sampler.sample(100_000, Interval(), g, PROCESS, g)
    assert (t < 20).double().mean().item() == pytest.approx(0.5 + 0.5 * 0.2, abs=0.01)
    assert t.min() == 0 and t.max() == 99 and (weight == 1).all()
    with pytest.raises(ValueError, match="share 2"):
        CleanBiased(share=2)


def test_a_schedule_that_ends_too_early_is_told(tmp_path):
    options = [
        "--study.iterations=1", "--data.samples=500", "--trainer.accelerator=cpu",
        "--trainer.logger=JsonLines", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="bits from the normal distribution"):
        main(["fit", "--config", CONFIG, f"--study.root={tmp_path}", *options])


def test_weight_decay_is_upstreams():
    """The paper's preset leaves it out of its YAML: torch's default must stay what it was."""
    assert AdamW([torch.zeros(1)]).defaults["weight_decay"] == 0.01
