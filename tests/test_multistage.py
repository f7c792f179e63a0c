"""One encoder, a decoder an interval: who acts, who learns, and which t are drawn."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from expertdiff.bundle import Bundle, Expert
from expertdiff.cli import main
from expertdiff.data.base import Batch
from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import Eps, NetworkDenoiser
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import VPSDE, DiscreteVP, LinearBetas
from expertdiff.diffusion.timesteps import Staged, Step, Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.experts.multistage import MultiStage, MultiStageUNet
from expertdiff.experts.size import active, stored
from expertdiff.methods.mdm import MDM
from expertdiff.methods.single import Diffusion
from expertdiff.networks.mlp import MLPDenoiser
from expertdiff.networks.network import Network
from expertdiff.networks.unet import ADMUNet

EDGES = Partition([0, 0.442, 0.631, 1])
CHAIN = DiscreteVP(LinearBetas())
WHOLE = Interval()


def unet(**options) -> ADMUNet:
    return ADMUNet(
        8, in_channels=1, model_channels=8, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(4,), num_head_channels=8, **options,
    )  # fmt: skip


def mlp(**options) -> MLPDenoiser:
    return MLPDenoiser(16, T=1000, **options)


MODELS = {
    "unet": (unet, [16, 8, 8], (1, 8, 8)),
    "labels": (lambda: unet(num_classes=3), [16, 8, 8], (1, 8, 8)),
    "mlp": (mlp, [24, 16, 8], (2,)),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A network in which every parameter matters, and inputs of all stages, mixed."""
    plain, widths, shape = MODELS[request.param]
    torch.manual_seed(0)
    net = MultiStage(plain(), widths, EDGES)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    t = torch.tensor([999, 0, 500, 441, 442, 630, 631, 100, 700])
    y = None if net.num_classes is None else torch.arange(9) % 3
    return net, torch.randn(9, *shape), t, y


# Who acts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain, own, shape", [(unet, 8, (1, 8, 8)), (mlp, 16, (2,))])
def test_one_decoder_is_the_plain_network_bit_for_bit(plain, own, shape):
    def trained(network):
        module = Diffusion(
            network=network, process=CHAIN, prediction=Eps(), timesteps=Uniform(),
            weighting=Simple(), partition=EDGES, seed=5,
        )  # fmt: skip
        net = module.network
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            x, t = torch.randn(6, *shape), torch.randint(1000, (6,))
            optimizer.zero_grad()
            (net(x, t) - x).square().mean().backward()
            optimizer.step()
        return net

    net, stages = trained(plain()), trained(MultiStage(plain(), [own], Partition([0, 1])))
    ours, theirs = stages.expert(0), net.state_dict()
    assert list(ours) == list(theirs) and stored(stages) == stored(net)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_each_stage_is_a_plain_network_with_a_decoder_of_its_width(model):
    net, x_t, t, y = model
    out = net(x_t, t, y)
    owner = EDGES.index(CHAIN.progress(t))
    assert owner.tolist() == [2, 0, 1, 0, 1, 1, 2, 0, 2]  # 441 and 630 lie on the edges
    for i, decoder in enumerate(net.decoders):
        description = describe(net)["init_args"]["network"]
        description["init_args"]["decoder_width"] = decoder.decoder_width
        plain = build(description, Network)
        plain.load(net.expert(i))
        mine = owner == i
        alone = plain(x_t[mine], t[mine], None if y is None else y[mine])
        torch.testing.assert_close(out[mine], alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(alone, net(x_t[mine], t[mine], None if y is None else y[mine]))


def test_decoders_learn_from_their_own_rows(model):
    net, x_t, t, y = model
    owner = EDGES.index(CHAIN.progress(t))
    for i in range(3):
        net.zero_grad()
        loss = net(x_t, t, y).flatten(1).square().sum(1)
        loss[owner == i].sum().backward()
        moved = [
            any(p.grad is not None and p.grad.any() for p in each.parameters())
            for each in net.decoders
        ]
        assert moved == [j == i for j in range(3)]
        assert all(p.grad.any() for p in net.encoder.parameters())


def test_a_network_is_built_again_from_what_is_written_down(model):
    net, x_t, t, y = model
    again = build(describe(net), Network)
    again.load(net.state_dict())
    assert torch.equal(again(x_t, t, y), net(x_t, t, y))


def test_size_of_what_acts():
    net = MultiStageUNet(unet(learn_sigma=False), [16, 8, 8], EDGES)
    found = active(NetworkDenoiser(net, CHAIN, Eps()), (1, 8, 8))
    assert [each.interval for each in found] == EDGES.intervals()
    for each, width in zip(found, [16, 8, 8]):
        plain = unet(learn_sigma=False, decoder_width=width)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            plain.to("meta")(torch.zeros(1, 1, 8, 8, device="meta"), torch.zeros(1, device="meta"))
        assert (each.parameters, each.flops) == (stored(plain), counter.get_total_flops())
    shared = stored(net.encoder)
    assert sum(each.parameters for each in found) - 2 * shared == stored(net)
    assert all(p.device.type == "cpu" for p in net.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((mlp(), [16, 16], EDGES), r"widths \[16, 16\] are of 2 decoders"),
        ((mlp(), [16, 0, 16], EDGES), "decoder_width 0"),
        ((unet(), [8, 0, 8], EDGES), "decoder_width 0"),
        ((mlp(), [16] * 3, EDGES, 100), "made for 1000 timesteps, not 100"),
        ((unet(), [8] * 2, Partition([0, 0.5, 1]), 1), r"interval \(0, 0.5\] holds none"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiStage(*arguments)


def test_other_times_are_refused():
    net = MultiStage(mlp(), [16] * 3, EDGES)
    with pytest.raises(ValueError, match="integer timesteps, not t of torch.float32"):
        net(torch.zeros(2, 2), VPSDE().condition(torch.tensor([0.1, 0.9])))
    with pytest.raises(ValueError, match="seeds cannot be trained side by side"):
        net(torch.zeros(3, 2, 2), torch.zeros(3, 2).long())


# Which t ------------------------------------------------------------------------------------------


def staged(probs="uniform", interval=WHOLE, stages=EDGES) -> Staged:
    sampler = Staged(probs)
    sampler.prepare(CHAIN, interval, stages)
    return sampler


def draws(sampler, n, seed=0, interval=WHOLE):
    g = torch.Generator().manual_seed(seed)
    t, weight = sampler.sample(n, interval, g, CHAIN, Step(g))
    assert torch.equal(weight, torch.ones(n))
    return t


def chi_square(counts, expected) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected))


@pytest.mark.parametrize(
    "probs, shares",
    [
        ("uniform", [1 / 3] * 3),
        ("proportional", [0.442, 0.189, 0.369]),
        ([0.6, 0.3, 0.1], [0.6, 0.3, 0.1]),
    ],
)
def test_stages_come_as_often_as_asked(probs, shares):
    """By the first draw of many batches: those of one batch depend on each other."""
    sampler = staged(probs)
    first = torch.stack([draws(sampler, 10, seed)[0] for seed in range(1500)])
    counts = EDGES.index(CHAIN.progress(first)).bincount(minlength=3).tolist()
    assert chi_square(counts, [1500 * p for p in shares]) < 13.8  # p = .001, 2 degrees


def test_inside_a_stage_every_t_is_alike():
    t = draws(staged(), 90_000)
    for interval in EDGES.intervals():
        steps = interval.steps(1000)
        mine = t[(t >= steps.start) & (t < steps.stop)]
        assert len(mine) == 30_000 and (mine.min(), mine.max()) == (steps[0], steps[-1])
        counts = (mine - steps.start).mul(20).div(len(steps), rounding_mode="floor").bincount()
        sizes = Counter(20 * i // len(steps) for i in range(len(steps)))
        expected = [30_000 * sizes[i] / len(steps) for i in range(20)]
        assert chi_square(counts.tolist(), expected) < 43.8  # p = .001, 19 degrees


def test_every_rank_and_micro_batch_has_every_decoder():
    """Without them a parallel training would wait for gradients that never come."""
    for probs, shares in (("uniform", [1 / 3] * 3), ([0.7, 0.2, 0.1], [0.7, 0.2, 0.1])):
        sampler = staged(probs)
        for rank_and_micro_batch in range(200):
            t = draws(sampler, 10, rank_and_micro_batch)
            counts = EDGES.index(CHAIN.progress(t)).bincount(minlength=3).tolist()
            low = [math.floor(10 * p + 1e-9) for p in shares]
            assert all(1 <= a <= c <= a + 1 for a, c in zip(low, counts)), counts


def test_inside_an_expert_only_its_part_of_a_stage_is_drawn():
    interval = Interval(0.631, 1)
    t = draws(staged(interval=interval), 100, interval=interval)
    assert set(EDGES.index(CHAIN.progress(t)).tolist()) == {2}
    interval = Interval(0.3, 0.5)  # .142 of .442, .058 of .189
    t = draws(staged("proportional", interval), 100, interval=interval)
    counts = EDGES.index(CHAIN.progress(t)).bincount().tolist()
    assert counts == [71, 29] and t.min() >= 300 and t.max() < 500


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: Staged([0.5, 0.4]), r"stage_probs \[0.5, 0.4\] must be positive and sum to 1"),
        (lambda: Staged([1.0, 0.0]), "must be positive"),
        (lambda: Staged([]), "must be positive"),
        (lambda: staged([0.5, 0.5]), "of 2 stages, but .* has 3"),
        (lambda: draws(staged(), 2), "use batches of 3 or more"),
        (lambda: draws(staged([0.9, 0.05, 0.05]), 19), "use batches of 20 or more"),
    ],
)
def test_probabilities_that_cannot_be_had(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_decoder_by_decoder_each_job_has_its_own(monkeypatch):
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, world_size=1, max_steps=10)
    monkeypatch.setattr(MDM, "global_rank", 0)
    monkeypatch.setattr(MDM, "trainer", trainer)
    batch = Batch(torch.randn(8, 2), torch.zeros(8).long(), torch.arange(8))
    module = MDM(
        expert=1, network=MultiStage(mlp(), [24, 16, 8], EDGES), process=CHAIN, prediction=Eps(),
        timesteps=Staged(), weighting=Simple(), partition=EDGES,
    )  # fmt: skip
    step = module.training_step(batch, 0)
    step["loss"].backward()
    assert set(step["t"].tolist()) <= set(EDGES.interval(1).steps(1000))
    moved = [any(p.grad is not None for p in d.parameters()) for d in module.network.decoders]
    assert moved == [False, True, False]


# Through the front door ---------------------------------------------------------------------------


def fit(root: Path, *options: str) -> int:
    configs = ("configs/toys/multistage.yaml", "tests/conf/toy.yaml")
    small = ["--model.network.network.width=16", "--model.network.widths=[24,16,8]"]
    arguments = [f"--config={ROOT / path}" for path in configs]
    return main(["fit", *arguments, *small, f"--study.root={root}", *options])


def test_trained_together_bundled_and_exported(tmp_path, capsys):
    assert fit(tmp_path, "--study.iterations=4") == 0
    assert "active in (0.6, 1]" in capsys.readouterr().out
    job = tmp_path / "moons-multistage/baseline"
    bundle = Bundle.stitch([job], tmp_path / "bundle")
    net = bundle.denoiser.network
    assert bundle.denoiser.partition == Partition([0, 0.3, 0.6, 1])
    assert main(["export", str(bundle.folder), "--output", str(tmp_path / "plain")]) == 0
    for i in range(3):
        weights = torch.load(tmp_path / f"plain/0{i}.pt", weights_only=True)
        assert all(torch.equal(weights[key], value) for key, value in net.expert(i).items())
    assert Expert.read(job).step == 4


def test_refused_in_one_sentence(tmp_path, capsys):
    assert fit(tmp_path, "--model.network.widths=[24,16]") == 2
    assert "give one width an interval" in capsys.readouterr().err
    assert fit(tmp_path, "--model.seeds=[0,1]") == 2
    assert "train one seed a job" in capsys.readouterr().err
    (tmp_path / "cut.json").write_text('{"edges": [0, 0.2, 0.5, 1]}')
    config = f"--config={ROOT / 'configs/toys/multistage.yaml'}"
    assert main(["launch", config, f"--partition={tmp_path / 'cut.json'}"]) == 2
    assert "which --partition does not set: name them there" in capsys.readouterr().err
    assert main(["intervals", config, "--train=60", f"--output={tmp_path}"]) == 2
    assert "Diffusion trains none: name a configuration of MDM" in capsys.readouterr().err
