"""The losses of experts on each other's intervals."""

import copy
from types import SimpleNamespace

import pytest
import torch

from expertdiff.analysis.losses import best_at_home, expert_losses, losses_figure
from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.timesteps import Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.experts.multistage import MultiStage
from expertdiff.experts.remixed import Remixed
from expertdiff.experts.routed import RoutedExperts
from expertdiff.methods.mdm import MDM
from expertdiff.methods.remix import Remix
from expertdiff.networks.mlp import MLPDenoiser

PROCESS = DiscreteVP(LinearBetas())
X0 = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
BATCH = Batch(X0, torch.zeros(50).long(), torch.arange(50))


def denoiser(network):
    return NetworkDenoiser(network.eval(), PROCESS, Eps())


def mixed(experts=3):
    torch.manual_seed(0)
    return Remixed(MLPDenoiser(16, 2, T=1000), ["ff"], bases=2, experts=experts)


def validated(cls, partition, weights, network, **options):
    """The mse of each interval of `partition`, as a method validates its network."""
    module = cls(
        network=network, process=PROCESS, prediction=Eps(), timesteps=Uniform(),
        weighting=Simple(), partition=partition, **options,
    )  # fmt: skip
    module.network.load(weights)
    module._trainer = SimpleNamespace(global_step=0)
    with torch.no_grad():
        found = module.eval().validation_step(BATCH, 0)
    return {i: mse.double().mean().item() for i, (mse, _) in found.items()}


def test_each_decoder_is_asked_everywhere():
    torch.manual_seed(0)
    network = MultiStage(MLPDenoiser(16, 2, T=1000), [16, 8], Partition([0, 0.5, 1]))
    found = expert_losses(denoiser(network), X0, None)
    assert network.active is None
    for i, width in enumerate([16, 8]):
        plain = MLPDenoiser(16, 2, T=1000, decoder_width=width)
        plain.load(network.expert(i))
        whole = RoutedExperts([denoiser(plain), denoiser(copy.deepcopy(plain))], network.partition)
        assert found["mse"][i] == pytest.approx(expert_losses(whole, X0, None)["mse"][0], rel=1e-5)


def test_each_expert_is_asked_everywhere():
    """Of a mixed and of a routed model: row i is what expert i, alone, has everywhere."""
    network = mixed()
    plains = [MLPDenoiser(16, 2, T=1000) for _ in range(3)]
    for plain, weights in zip(plains, network.export_experts()):
        plain.load(weights)
    partition = network.partition
    routed = RoutedExperts([denoiser(plain) for plain in plains], partition)
    ours, theirs = (expert_losses(m, X0, None) for m in (denoiser(network), routed))
    assert torch.allclose(torch.tensor(ours["mse"]), torch.tensor(theirs["mse"]), rtol=1e-5)
    for i, plain in enumerate(plains):
        one = [plain.state_dict(), MLPDenoiser(16, 2, T=1000)]
        own = validated(MDM, partition, *one, expert=i)
        assert own == {i: pytest.approx(theirs["mse"][i][i], rel=1e-6)}
    assert network.active is None
    assert ours["experts"] == [0, 1, 2] and ours["items"] == 50
    assert ours["intervals"] == [[i.lo, i.hi] for i in partition.intervals()]
    # Distinct experts, so that no row could stand for another.
    assert len({round(loss, 6) for row in theirs["mse"] for loss in row}) == 9


def test_the_diagonal_is_what_is_validated():
    network = mixed()
    own = validated(Remix, network.partition, network.state_dict(), mixed())
    record = expert_losses(denoiser(network), X0, None)
    assert list(own.values()) == pytest.approx([record["mse"][i][i] for i in range(3)], rel=1e-6)


def test_of_many_experts_some_are_asked():
    record = expert_losses(denoiser(mixed(experts=100)), X0[:3], None)
    assert len(record["mse"]) == len(record["mse"][0]) == 20
    assert record["experts"][0] == 0 and record["experts"][-1] == 99
    assert record["intervals"][-1] == [0.99, 1.0]


def test_a_failure_leaves_no_expert_active():
    network = mixed()
    with pytest.raises(RuntimeError):
        expert_losses(denoiser(network), torch.zeros(3, 5), None)
    assert network.active is None


def test_the_picture_is_in_per_cent_of_the_owner():
    record = {"mse": [[2.0, 3.0], [2.5, 4.0]], "experts": [0, 9]}
    assert best_at_home(record) == 1
    (axes,) = losses_figure(record).axes
    assert [text.get_text() for text in axes.texts] == ["own", "-25", "+25", "own"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "9"]
