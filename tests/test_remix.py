"""Training of mixed experts: who is trained when, what moves the coefficients, and resuming."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import CosineAnnealingLR

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, Expert
from expertdiff.callbacks.mixing import basis_similarity, mixing_figure
from expertdiff.checkpoints import AVERAGED, RAW
from expertdiff.cli import main
from expertdiff.data.base import Batch
from expertdiff.diffusion.denoiser import Eps
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import DDPM, SampleNoise
from expertdiff.diffusion.timesteps import LossSecondMoment, Uniform
from expertdiff.diffusion.weighting import Simple
from expertdiff.experts.remixed import OneHot, Remixed
from expertdiff.methods.remix import Official, Paper, Remix
from expertdiff.metrics import read_metrics
from expertdiff.networks.mlp import MLPDenoiser

TABLE = "denoiser.network.coefficients.weight"


def network(**options):
    return Remixed(MLPDenoiser(16, 2, T=1000), ["ff"], **options)


def method(net=None, steps=1000, **options):
    arguments = {"timesteps": Uniform(), "partition": Partition([0, 0.5, 1])} | options
    module = Remix(
        network=net or network(), process=DiscreteVP(LinearBetas()), prediction=Eps(),
        weighting=Simple(), **arguments,
    )  # fmt: skip
    data = SimpleNamespace(batch_size=8, split=lambda name: (torch.zeros(320, 2), None))
    module._trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1,
        max_steps=steps, datamodule=data,
    )  # fmt: skip
    return module


def batch(n=8):
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return Batch(x0, torch.zeros(n).long(), torch.arange(n))


# The strength of the prior ------------------------------------------------------------------------


def test_gamma_of_the_paper_falls_to_0():
    gamma = Paper()
    assert [gamma(s, 1000, 10) for s in (0, 500, 1000)] == pytest.approx([1e-4, 5e-5, 0])


def test_gamma_of_the_released_program_halves_by_epochs():
    gamma = Official()
    values = [gamma(s, 100_080, 5004) for s in (0, 5003, 5004, 19 * 5004, 100_079)]
    assert values == pytest.approx([2e-4, 2e-4, 1.95e-4, 1.05e-4, 1.05e-4])


def test_the_prior_adds_gamma_times_the_mean_cross_entropy_of_all_rows():
    module = method(gamma=Official(0.5), steps=400)
    module._trainer.global_step = 120  # epochs of 320 / 8 = 40 steps: the fourth of ten
    coefficients = module.network.coefficients
    rows = -(coefficients().log() * coefficients.prior).sum(1)
    expected = 0.5 * (2 - 3 / 10) * rows.mean()
    assert torch.isclose(module.regularised(None, None, None), expected)


def test_other_rows_feel_the_prior_alone():
    module = method(gamma=Paper(0.5))
    loss = module.training_step(batch(), 0)["loss"]
    loss.backward()
    coefficients = module.network.coefficients
    active, n = module.expert(0, 0, 0), 20
    prior = 0.5 * (coefficients() - coefficients.prior) / n
    gradient = coefficients.weight.grad
    others = [i for i in range(n) if i != active]
    assert torch.allclose(gradient[others], prior[others], atol=1e-7)
    assert (gradient[active] - prior[active]).abs().max() > 1e-4


# Who is trained -----------------------------------------------------------------------------------


def test_ranks_train_different_experts():
    module = method()
    for micro_batch in range(20):
        assert len({module.expert(3, rank, micro_batch) for rank in range(20)}) == 20
    assert module.expert(3, 21, 0) == module.expert(3, 1, 0)


def test_experts_come_alike_often_and_in_no_order():
    module = method(net=network(experts=5, bases=2))
    drawn = torch.tensor([module.expert(0, 1, m) for m in range(5000)])
    assert (drawn.bincount() - 1000).abs().max() < 4 * (5000 * 0.2 * 0.8) ** 0.5
    pairs = (5 * drawn[:-1] + drawn[1:]).bincount()
    assert (pairs - 200).abs().max() < 4.5 * (5000 * 0.04 * 0.96) ** 0.5
    assert [module.expert(1, 1, m) for m in range(20)] != drawn[:20].tolist()


def test_a_batch_lies_in_the_interval_of_its_expert():
    module = method(net=network(experts=12))
    for step in range(30):
        module._trainer.global_step = step
        t = module.training_step(batch(), step)["t"]
        steps = module.network.partition.interval(module.expert(0, 0, step)).steps(1000)
        assert all(s in steps for s in t.tolist())


def test_no_expert_stays_active():
    module, bad = method(), batch()._replace(x0=torch.zeros(8, 3))
    module.training_step(batch(), 0)
    assert module.network.active is None
    with pytest.raises(RuntimeError):
        module.training_step(bad, 0)
    assert module.network.active is None


def test_losses_of_an_interval_come_from_each_expert_in_it():
    module = method(net=network(experts=8)).eval()
    with torch.no_grad():
        losses = module.validation_step(batch(32), 0)
    assert sorted(losses) == [0, 1] and all(len(mse) == 32 for mse, _ in losses.values())


def parted(module, steps=4):
    """How far the bases are apart after a few steps from one plain network."""
    torch.manual_seed(0)
    module.network.start_from(MLPDenoiser(16, 2, T=1000).state_dict())
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=2e-5, weight_decay=0)
    for step in range(steps):
        module._trainer.global_step = step
        optimizer.zero_grad()
        module.training_step(batch(), step)["loss"].backward()
        optimizer.step()
    return basis_similarity(module.network)[0]


def test_bases_part_where_experts_alternate():
    """One expert trained alone cannot tell equal bases apart: Adam forgets its coefficients."""
    in_turn, alone = method(gamma=Paper(0)), method(gamma=Paper(0))
    alone.expert = lambda *key: 7
    assert parted(in_turn) > 50 * parted(alone)


# The optimizer ------------------------------------------------------------------------------------


def test_coefficients_have_their_own_rate_and_both_end_alike():
    module = method(
        steps=50,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-5),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, T_max=0, eta_min=1e-5),
    )
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rest, table = optimizer.param_groups
    assert [rest["lr"], table["lr"]] == [2e-5, 1e-2]
    assert [p is module.network.coefficients.weight for p in table["params"]] == [True]
    assert {*rest["params"], *table["params"]} == set(module.network.parameters())
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    assert [rest["lr"], table["lr"]] == pytest.approx([1e-5, 1e-5])


def test_one_hot_coefficients_are_not_trained():
    groups = method(net=network(mixer=OneHot())).parameter_groups()
    assert len(groups) == 1 and "lr" not in groups[0]


# Pictures and numbers -----------------------------------------------------------------------------


def test_similarity_of_bases_in_closed_form():
    net = network(bases=3, experts=3)
    with torch.no_grad():
        for stack in net.stacks().values():
            first, second, third = stack.zero_()
            first.view(-1)[0], second.view(-1)[0], third.view(-1)[1] = 1, 4, 1
    # Pairs: one direction, 1 and 4 long; right angles, 1 and 1, then 4 and 1 long.
    expected = (3 / 2 + 2**0.5 + 17**0.5 / 2) / 3, 1 / 3
    assert basis_similarity(net) == pytest.approx(expected)
    assert basis_similarity(network(bases=1)) == (0, 1)


def test_the_picture_says_hundredths():
    (axes,) = mixing_figure(torch.tensor([[0.894, 0.106], [0.25, 0.75], [0.0, 1.0]])).axes
    assert [text.get_text() for text in axes.texts] == ["89", "11", "25", "75", "0", "100"]
    assert len(mixing_figure(torch.rand(3, 20, 4)).axes) == 3
    assert not mixing_figure(torch.rand(1000, 4)).axes[0].texts


# Through the front door ---------------------------------------------------------------------------

CONFIG = [f"--config={ROOT / path}" for path in ("configs/toys/remix.yaml", "tests/conf/toy.yaml")]
SMALL = ["--model.network.experts=8", "--model.network.network.width=32"]


def fit(root: Path, name: str, *options: str) -> Path:
    arguments = [*CONFIG, *SMALL, f"--study.root={root}", f"--study.name={name}", *options]
    assert main(["fit", *arguments]) == 0
    return root / name / "remix"


def weights(folder: Path, step: int = 12):
    content = checkpoints.load(checkpoints.checkpoint_path(folder / "checkpoints", step))
    return content[AVERAGED], content[RAW]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remix")
    return fit(root, "whole", "--trainer.num_sanity_val_steps=1")


class StopAt(Callback):
    """Asks for an end in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(trained, tmp_path):
    stop = ["--trainer.callbacks+=test_remix.StopAt", "--trainer.callbacks.step=5"]
    assert main(["fit", *CONFIG, *SMALL, *stop, f"--study.root={tmp_path}"]) == 75
    resumed = fit(tmp_path, "moons-remix")
    for ours, theirs in zip(weights(resumed), weights(trained)):
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    averaged, raw = weights(trained)
    assert not torch.equal(averaged[TABLE], raw[TABLE])


def test_pictures_and_similarities_come_with_each_validation(trained):
    pictures = sorted(path.name for path in (trained / "mixing").iterdir())
    assert pictures == [f"step-000000{step:02d}.png" for step in (4, 8, 12)]
    lines = [x for x in read_metrics(trained / "metrics.jsonl") if "mixing/basis_distance" in x]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(1 < line["mixing/basis_distance"] < 2 for line in lines)


def test_a_bundle_mixes_what_was_trained(trained, tmp_path):
    bundle = Bundle.stitch([trained], tmp_path / "bundle")
    averaged, _ = weights(trained)
    net = bundle.denoiser.network
    assert torch.equal(net.coefficients.weight, averaged[TABLE]) and len(net.partition) == 8
    samples = DDPM(clip=False)(bundle.denoiser, SampleNoise(0, range(5), (2,), "cpu"))
    assert samples.shape == (5, 2) and samples.isfinite().all()


@pytest.mark.parametrize(
    "option, message",
    [
        ("--model.gamma=Official", "gamma.class_path: "),
        ("--model.coefficient_lr=0.1", "coefficient_lr: 0.1 != 0.01"),
        ("--study.iterations=13", "gamma_steps: 13 != 12"),
        ("--model.network.mixer=Raw", "network.mixer"),
        ("--model.network.bases=5", "network.bases: 5 != 4"),
    ],
)
def test_another_run_is_not_resumed(trained, capsys, option, message):
    root, name = trained.parents[1], trained.parent.name
    arguments = [*CONFIG, *SMALL, f"--study.root={root}", f"--study.name={name}", option]
    assert main(["fit", *arguments, "--model.lr_scheduler.T_max=12"]) == 2
    assert message in capsys.readouterr().err


def test_all_experts_start_from_one_network(tmp_path):
    single = ["--config", str(ROOT / "configs/toys/mdm.yaml"), *CONFIG[1:], "--model=Diffusion"]
    single += ["--model.network.width=32", f"--study.root={tmp_path}", "--study.name=single"]
    assert main(["fit", *single]) == 0
    start = f"--model.init_from={tmp_path / 'single' / 'baseline'}"
    still = ["--model.optimizer.lr=0", "--model.coefficient_lr=0.01", "--ema.decay=0"]
    folder = fit(tmp_path, "started", start, *still, "--study.iterations=2")
    net = Expert.read(folder).denoiser().network
    plain = Expert.read(tmp_path / "single" / "baseline").weights
    for expert in net.export_experts():
        assert all(torch.allclose(expert[key], value, atol=1e-6) for key, value in plain.items())


def test_a_refit_moves_the_coefficients_alone(trained, tmp_path):
    start = f"--model.init_from={trained}"
    folder = fit(tmp_path, "refit", start, "--model.refit=true", "--study.iterations=3")
    (_, after), (before, _) = weights(folder, 3), weights(trained)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {TABLE}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.seeds=[0,1]"], "cannot be trained stacked"),
        (["--model.network=MLPDenoiser"], "MLPDenoiser has no bases to mix"),
        (["--model.timesteps=LossSecondMoment"], "LossSecondMoment draws from the whole chain"),
        (["--model.refit=true"], "refit trains the coefficients of trained bases"),
        (["--model.init_from={}", "--model.network.mixer=Raw"], "of another mixer"),
        (["--model.init_from={}", "--model.network.bases=2"], r"is (8, 4) instead of (8, 2)"),
    ],
)
def test_refusals(trained, tmp_path, capsys, options, message):
    options = [option.format(trained) for option in options]
    assert main(["fit", *CONFIG, *SMALL, f"--study.root={tmp_path}", *options]) == 2
    assert message in capsys.readouterr().err


def test_more_refusals():
    with pytest.raises(ValueError, match="gamma -1 must not be negative"):
        Official(-1)
    with pytest.raises(ValueError, match="use Uniform"):
        method(timesteps=LossSecondMoment())


def test_only_bases_that_were_trained_apart_are_refit(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(MLPDenoiser(16, 2, T=1000).state_dict(), path)
    with pytest.raises(ValueError, match="refit trains the coefficients of trained bases"):
        method(init_from=path, refit=True)
    torch.save(network().state_dict(), path)
    assert method(init_from=path, refit=True).network.coefficients.weight.requires_grad
