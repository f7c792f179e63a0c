"""Discriminator guidance: its formula where the logit is known, and its training."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, Expert
from expertdiff.cli import main
from expertdiff.data import RealAndGenerated, Toy2D
from expertdiff.data.densities import Gaussians, Moons
from expertdiff.describe import build, describe
from expertdiff.diffusion.denoiser import Denoiser
from expertdiff.diffusion.exact import ExactDenoiser, Mixture
from expertdiff.diffusion.guidance import Discriminated, Guidance
from expertdiff.diffusion.partition import Interval, Partition
from expertdiff.diffusion.process import VESDE, VPSDE, CosineBetas, DiscreteVP, LinearBetas, expand
from expertdiff.diffusion.samplers import DDIM, DDPM, Heun, SampleNoise
from expertdiff.diffusion.timesteps import Step, UniformLogSNR
from expertdiff.diffusion.weighting import Simple
from expertdiff.discriminator import Discriminator, RoutedLogit
from expertdiff.experts.routed import RoutedExperts
from expertdiff.loggers import read_metrics
from expertdiff.methods.discrimination import Discrimination
from expertdiff.networks.encoder import ImageLogit
from expertdiff.networks.mlp import MLPLogit
from expertdiff.seeds import generator

CONFIGS = Path(__file__).parents[1] / "configs"
CHAIN = DiscreteVP(CosineBetas(), 100)
ONE = ("--config", CONFIGS / "toys/mdm.yaml", "--config", CONFIGS / "toys/discriminator.yaml")


def gaussian(mean, std, process=CHAIN) -> Denoiser:
    mixture = Mixture(torch.tensor([mean]), torch.ones(1), torch.tensor(std))
    return ExactDenoiser(mixture, process)


class Analytic(nn.Module):
    """log N(x_t; data) - log N(x_t; model), up to a constant: the logit of a perfect classifier."""

    def __init__(self, data, model, process=CHAIN):
        super().__init__()
        self.sets, self.process = (data, model), process

    def forward(self, x_t, t):
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(t))
        data, model = (
            -(x_t - alpha * torch.tensor(mean)).square()
            / (2 * (sigma**2 + alpha**2 * torch.tensor(std).square()))
            for mean, std in self.sets
        )
        return (data - model).sum(1)


DATA, MODEL = ([0.5, -1.0], [0.3, 0.8]), ([1.0, -0.5], [0.5, 0.6])


@pytest.mark.parametrize("process", [CHAIN, VPSDE(), VESDE()], ids=lambda p: type(p).__name__)
def test_a_perfect_logit_at_weight_1_makes_the_true_denoiser(process):
    torch.manual_seed(0)
    x_t = torch.randn(32, 2)
    t = process.times(torch.rand(32), Interval(0.05, 1))
    true, model = gaussian(*DATA, process), gaussian(*MODEL, process)
    found = Discriminated(model, Analytic(DATA, MODEL, process), 1.0)(x_t, t)
    torch.testing.assert_close(found.eps, true(x_t, t).eps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.x0, true(x_t, t).x0, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found.eps, model(x_t, t).eps, atol=1e-2)


def drawn(weight, sampler, n=4000):
    model = gaussian(*MODEL)
    guided = Discriminated(model, Analytic(DATA, MODEL), weight) if weight else model
    return sampler(guided, SampleNoise(0, range(n), (2,), "cpu"))


def error(samples):
    """How far mean and standard deviation are from the data's."""
    mean, std = map(torch.tensor, DATA)
    return max((samples.mean(0) - mean).abs().max(), (samples.std(0) - std).abs().max()).item()


def test_samples_come_right_at_weight_1_and_worse_below_0():
    errors = {w: error(drawn(w, DDIM(steps=20, clip=False))) for w in (-1.0, 0.0, 0.5, 1.0)}
    assert errors[1.0] < 0.05 < errors[0.5] < errors[0.0] < errors[-1.0]


def test_gradients_are_taken_where_none_are_kept():
    x_t, t = torch.randn(4, 2), torch.full((4,), 30)
    guided = Discriminated(gaussian(*MODEL), Analytic(DATA, MODEL), 1.0)
    expected = guided(x_t, t).eps
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(guided(x_t.clone(), t.clone()).eps, expected)
    assert not expected.requires_grad and not x_t.requires_grad


def test_only_the_first_call_of_a_heun_step_is_guided():
    calls = []

    class Counted(Analytic):
        def forward(self, x_t, t):
            calls.append(int(t[0]))
            return super().forward(x_t, t)

    guided = Discriminated(gaussian(*MODEL), Counted(DATA, MODEL), 1.0)
    Heun(steps=5, clip=False)(guided, SampleNoise(0, [0], (2,), "cpu"))
    assert calls == CHAIN.visited(5).tolist()


@pytest.mark.parametrize(
    "process", [DiscreteVP(LinearBetas()), VPSDE(), VESDE()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("interval", [Interval(), Interval(0.1, 0.8)], ids=str)
def test_t_is_uniform_in_log_snr(process, interval):
    draws = generator("cpu", 0), generator("cpu", 1)
    t, weight = UniformLogSNR().sample(20_000, interval, draws[0], process, Step(draws[1]))
    progress = process.progress(t)
    assert (interval.lo < progress).all() and (progress <= interval.hi).all()
    assert (weight == 1).all()
    log_snr = process.snr(t).log()
    first, last = process.snr(process.times(torch.tensor([0.0, 1 - 2**-24]), interval)).log()
    share = ((log_snr - last) / (first - last)).histc(4, 0, 1) / len(t)
    torch.testing.assert_close(share, torch.full_like(share, 0.25), rtol=0, atol=0.02)


def test_a_draw_copies_nothing_from_the_host(monkeypatch):
    draws = generator("cpu", 0), generator("cpu", 1)
    monkeypatch.setattr(torch, "tensor", None)
    UniformLogSNR().sample(8, Interval(0.1, 0.8), draws[0], CHAIN, Step(draws[1]))


def test_the_nearest_timestep_of_a_log_snr():
    t = torch.arange(100)
    log_snr = CHAIN.snr(t).log()
    assert torch.equal(CHAIN.at_log_snr(log_snr), t)
    assert torch.equal(CHAIN.at_log_snr(log_snr[:-1] * 0.6 + log_snr[1:] * 0.4), t[:-1])
    assert CHAIN.at_log_snr(torch.tensor([99.0, -99.0])).tolist() == [0, 99]


def test_each_discriminator_judges_its_own_interval():
    class Constant(Denoiser):
        process = CHAIN

        def __init__(self, value):
            super().__init__()
            self.value, self.given = value, []

        def forward(self, x_t, t, y=None): ...

        def output(self, x_t, t, y):
            self.given.append(x_t)
            return self.value * x_t.sum(1, keepdim=True)

    experts = [Constant(1.0), Constant(2.0)]
    logit = RoutedLogit(RoutedExperts(experts, Partition([0, 0.5, 1])))
    x_t, t = torch.tensor([[1.0, 2.0]] * 4), torch.tensor([99, 49, 50, 0])
    assert logit(x_t, t).tolist() == [6, 3, 6, 3]
    assert logit(x_t, torch.full((4,), 99)).tolist() == [6, 6, 6, 6]
    assert experts[1].given[-1] is x_t  # of one owner nothing is gathered


def test_networks_make_one_number_an_item():
    assert MLPLogit()(torch.randn(5, 2), torch.arange(5)).shape == (5, 1)
    network = ImageLogit(8, in_channels=1, model_channels=8)
    assert torch.equal(network(torch.randn(5, 1, 8, 8), torch.arange(5)), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="image_size 6 cannot be halved 2 times"):
        ImageLogit(6)


# -- trained ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Of a bad generator of the moons: a wide Gaussian."""
    path = tmp_path_factory.mktemp("samples") / "samples.csv"
    points = 2 * np.random.default_rng(0).standard_normal((2000, 2))
    np.savetxt(path, points, delimiter=",")
    return path


def fit(root, samples, *options) -> int:
    return main(
        [
            *map(str, ("fit", *ONE)), f"--study.root={root}", "--study.name=d",
            "--study.iterations=120", f"--data.generated={samples}",
            "--data.real_data.samples=2000", "--model.network.width=32", "--model.network.depth=1",
            "--model.network.scale=2", "--data.batch_size=128", "--data.validation_samples=400",
            "--trainer.accelerator=cpu", "--trainer.precision=32-true",
            "--trainer.val_check_interval=40", "--checkpoint.every_n_steps=40",
            "--trainer.logger=JsonLines", "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false", *options,
        ]
    )  # fmt: skip


# Steps that grow from 0.001 to 10 spoil the weights, so that the last are not the best.
SPOIL = [
    "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
    "--model.lr_scheduler.gamma=1.08",
    "--ema.decay=0",
]


def held_out(folder) -> list[float]:
    key = "val/bce/0"
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, samples) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert fit(root, samples) == 0
    assert main(["stitch", f"{root}/d/discriminator-0", f"--output={root}/bundle"]) == 0
    return root


def test_a_bad_generator_is_found_out(trained):
    bce = held_out(trained / "d/discriminator-0")
    assert len(bce) == 3 and min(bce) < np.log(2) - 0.03


def test_shuffled_labels_teach_nothing(tmp_path, samples):
    assert fit(tmp_path, samples, "--data.shuffled=true") == 0
    assert min(held_out(tmp_path / "d/discriminator-0")) > np.log(2) - 0.01


def test_the_best_weights_are_stitched_and_count_as_the_whole_run(trained, samples, tmp_path):
    assert fit(tmp_path, samples, *SPOIL) == 0
    run = tmp_path / "d/discriminator-0"
    bce = held_out(run)
    assert min(bce) < bce[-1]
    expert = Expert.read(run)
    assert expert.path.name == "best.ckpt" and expert.step == 120
    best = torch.load(run / "best.ckpt", weights_only=True)
    assert best["global_step"] == 40 * (1 + bce.index(min(bce)))
    assert torch.equal(best["state_dict"]["best"], torch.tensor(min(bce)))


def test_a_kill_after_the_best_validation_does_not_cost_its_weights(samples, tmp_path, monkeypatch):
    def killed(self, batch, batch_idx):
        if self.trainer.global_step == 50:  # the checkpoint of 40 is of before its validation
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    step = Discrimination.training_step
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Discrimination, "training_step", killed)
        fit(tmp_path, samples, *SPOIL)
    assert fit(tmp_path, samples, *SPOIL) == 0
    run = tmp_path / "d/discriminator-0"
    bce = held_out(run)
    assert len(bce) == 3 and min(bce) == bce[0]
    best = checkpoints.load(run / "best.ckpt")
    assert best["global_step"] == 40 and best["state_dict"]["best"] == bce[0]


def test_a_kill_while_the_best_weights_are_written_does_not_stop_the_run(samples, tmp_path):
    stop = ["--trainer.max_steps=40", "--model.lr_scheduler.T_max=120"]
    assert fit(tmp_path, samples, *stop) == 0
    path = tmp_path / "d/discriminator-0/best.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    assert fit(tmp_path, samples, stop[1]) == 0
    assert checkpoints.load(path)["global_step"] > 40


def test_resumes_with_the_same_bits(trained, samples, tmp_path):
    stop = ["--trainer.max_steps=60", "--model.lr_scheduler.T_max=120"]
    assert fit(tmp_path, samples, *stop) == 0
    assert fit(tmp_path, samples, "--model.lr_scheduler.T_max=120") == 0
    parts = [root / "d/discriminator-0" for root in (trained, tmp_path)]
    a, b = (Expert.read(part).weights for part in parts)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert held_out(parts[0])[-1] == held_out(parts[1])[-1]


def test_the_best_loss_can_be_handed_to_other_ranks():
    method = Discrimination(
        network=MLPLogit(8, 1), process=CHAIN, weighting=Simple(), partition=Partition([0, 1])
    )
    method._trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums),
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        default_root_dir="",
        save_checkpoint=lambda path: None,
    )
    with torch.inference_mode():
        method.on_validation_start()
        method._sums += torch.tensor([3.0, 4.0])
        method.on_validation_end()
    assert method.best == 0.75 and not method.best.is_inference()


def wrong(trained) -> Denoiser:
    process = Bundle.load(trained / "bundle").denoiser.process
    return gaussian([0.0, 0.0], [2.0, 2.0], process)


def test_guides_towards_the_data(trained):
    model, sampler = wrong(trained), DDPM(clip=False, steps=25)
    noise = SampleNoise(0, range(1000), (2,), "cpu")
    real = Toy2D(Moons(), samples=1000).split("validation")[0]

    def off(weight):
        points = sampler(Discriminator(trained / "bundle", weight)(model), noise)
        return torch.cdist(points, real).amin(1).mean()

    assert off(1.0) < 0.9 * off(0.0) and off(-1.0) > 1.1 * off(0.0)


def test_weight_0_is_the_model_bit_for_bit(trained):
    model, noise = wrong(trained), SampleNoise(0, range(20), (2,), "cpu")
    guided = Discriminator(trained / "bundle", 0.0)(model)
    for sampler in (DDPM(clip=False, steps=10), Heun(clip=False, steps=5)):
        state = torch.get_rng_state()
        assert torch.equal(sampler(guided, noise), sampler(model, noise))
        assert torch.equal(torch.get_rng_state(), state)


def test_is_written_down_with_its_digest(trained, tmp_path):
    written = describe(Discriminator(trained / "bundle", 2.0))
    again = build(written, Guidance)
    assert again.weight == 2.0 and describe(again) == written
    written["init_args"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="is another discriminator"):
        build(written, Guidance)


def test_refusals(trained, samples, tmp_path, capsys):
    path = trained / "bundle"
    with pytest.raises(ValueError, match="weight nan must be finite"):
        Discriminator(path, float("nan"))
    guidance = Discriminator(path)
    with pytest.raises(ValueError, match="other noise than the model.*process.betas"):
        guidance(gaussian([0.0, 0.0], [1.0, 1.0]))
    data = guidance.bundle.manifest["shared"]["data"]
    guidance.check(data)
    with pytest.raises(ValueError, match="knows data of shape"):
        guidance.check(data | {"shape": [3, 8, 8]})
    with pytest.raises(ValueError, match="knows data of scale"):
        guidance.check(data | {"scale": {"centre": [1, 1], "unit": 2.0}})
    assert main(["sample", str(path), "--samples=4", f"--output={tmp_path}"]) == 2
    assert "a discriminator denoises nothing" in capsys.readouterr().err
    assert main([str(a) for a in ("launch", *ONE, f"--study.root={tmp_path}")]) == 2
    assert "train it with expertdiff fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="fewer than 10 items"):
        RealAndGenerated(Toy2D(Gaussians()), short(tmp_path)).split("train")


def short(folder) -> Path:
    path = folder / "short.csv"
    path.write_text("x,y\n1,2\n")
    return path


def test_a_model_is_no_discriminator(study):
    with pytest.raises(ValueError, match="is no discriminator"):
        Discriminator(study / "bundles/stitched")


def test_images_from_training_to_guided_samples(study, tmp_path):
    model = study / "bundles/stitched"
    assert main(["sample", str(model), "--samples=40", f"--output={tmp_path}"]) == 0
    options = [
        *TINY, "--config", str(CONFIGS / "digits/discriminator.yaml"),
        f"--study.root={tmp_path}", "--study.iterations=4", "--model.network.model_channels=8",
        "--data.batch_size=8", f"--data.generated={tmp_path}/samples.npz",
        "--trainer.val_check_interval=2", "--model.partition.edges=[0,0.5,1]",
    ]  # fmt: skip
    for i in range(2):
        assert main(["fit", *options, f"--model.expert={i}"]) == 0
    runs = [f"{tmp_path}/tiny/discriminator-{i}" for i in range(2)]
    assert main(["stitch", *runs, f"--output={tmp_path}/bundle"]) == 0
    for weight in (0, 50):
        guidance = [
            "--guidance=Discriminator", f"--guidance.path={tmp_path}/bundle",
            f"--guidance.weight={weight}",
        ]  # fmt: skip
        steps = ["--sampler=DDIM", "--sampler.steps=4"]
        drawn = ["--samples=8", f"--output={tmp_path}/{weight}", *steps]
        assert main(["sample", str(model), *drawn, *guidance]) == 0
    assert main(["sample", str(model), "--samples=8", *steps, f"--output={tmp_path}/plain"]) == 0
    plain, same, guided = (
        np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("plain", "0", "50")
    )
    assert (plain == same).all() and (plain != guided).any()
