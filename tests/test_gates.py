"""Gates whose weights are known, and the pictures of points while a network learns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

# GateMap's bare name is known to the command line once it is imported.
import expertdiff.callbacks.gates  # noqa: F401
from expertdiff.analysis.gates import gate_figure, gate_record, gate_weights
from expertdiff.callbacks.monitor import picture_of_step
from expertdiff.cli import main
from expertdiff.diffusion.process import DiscreteVP, LinearBetas
from expertdiff.diffusion.samplers import SampleNoise
from expertdiff.evaluation.points import limits_of, save_scatters
from expertdiff.experts.gated import GatedExperts, Top1

PROCESS = DiscreteVP(LinearBetas(), T=100)


def points(n=200):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0])


def constant(*logits, **options):
    """A gate that says the same everywhere."""
    network = GatedExperts(max(2, len(logits)), width=8, depth=1, gating=(8,), **options)
    torch.nn.init.zeros_(network.gating_network[-1].weight)
    network.gating_network[-1].bias.data = torch.tensor(logits, dtype=torch.float32)
    return network


def by_first_axis(k):
    """A gate of sigmoid(k x_1): the longest wave of the embedding is straight over the plane."""
    network = GatedExperts(width=8, depth=1, gating=(), scale=1.0)
    torch.nn.init.zeros_(network.gating_network[0].weight)
    torch.nn.init.zeros_(network.gating_network[0].bias)
    network.gating_network[0].weight.data[0, 63] = k * 1e4
    return network


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit, g", [(0.0, 0.5), (50.0, 1.0), (-50.0, 0.0)])
def test_a_constant_gate_is_recorded_as_it_is(logit, g):
    record = gate_record(constant(logit), PROCESS, points())
    assert record["t"] == [0, 99]
    assert np.allclose(record["mean"], [[g, 1 - g]] * 2)
    assert np.allclose(record["std"], 0)
    assert record["decided"] == (g != 0.5)


def test_the_weights_of_more_than_two_experts_are_recorded():
    record = gate_record(constant(0.0, math.log(2), 0.0), PROCESS, points())
    assert np.allclose(record["mean"], [[0.25, 0.5, 0.25]] * 2) and record["decided"] == 0
    assert gate_record(constant(0.0, 0.0, 50.0), PROCESS, points())["decided"] == 1


def test_weights_are_those_at_x_t_with_one_noise_a_point():
    x0, t = points(), torch.tensor([0, 40, 99])
    weights = gate_weights(by_first_axis(0.5), PROCESS, x0, t)
    eps = SampleNoise(0, range(len(x0)), (2,), "cpu")(0)
    for row, s in zip(weights, t):
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)).cumprod(0)[s]
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        g = (0.5 * x_t[:, 0]).sigmoid().float()
        assert torch.allclose(row, torch.stack([g, 1 - g], dim=1), atol=1e-4)
    assert weights.shape == (3, 200, 2) and not weights.requires_grad


def test_weights_are_those_that_blend_the_experts():
    network, x0, t = GatedExperts(3, width=8, depth=1, gating=(16,)), points(), torch.tensor([60])
    noise = SampleNoise(0, range(len(x0)), (2,), "cpu")(0)
    x_t = PROCESS.add_noise(x0, noise, t.expand(len(x0)))
    blended = network.blended(x_t, t.expand(len(x0)))[1]
    assert torch.equal(gate_weights(network, PROCESS, x0, t)[0], blended)


def test_decided_is_the_share_near_0_or_1_and_std_that_of_the_points():
    # At t = 0 the noise of std 0.01 moves no logit across ln 49, where g = 0.98.
    x0 = torch.tensor([[5.0, 0.0], [-5.0, 1.0], [3.5, 0.0], [0.0, 2.0]])
    record = gate_record(by_first_axis(1.0), PROCESS, x0)
    assert record["decided"] == 0.5
    g = x0[:, 0].sigmoid().numpy()
    assert np.allclose(record["mean"][0], [g.mean(), 1 - g.mean()], atol=5e-3)
    assert np.allclose(record["std"][0], g.std(), atol=5e-3)


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_the_ends_of_any_chain_are_recorded(T):
    assert gate_record(constant(0.0, T=T), DiscreteVP(LinearBetas(), T), points())["t"] == [
        0,
        T - 1,
    ]


# Pictures -----------------------------------------------------------------------------------------


def test_figure_shows_the_first_of_two_weights():
    x0 = points()
    figure = gate_figure(by_first_axis(1.0), PROCESS, x0)
    assert figure.get_figwidth() * figure.dpi == 1100
    spread, chain, data, *maps, bar = figure.axes
    weights = gate_weights(by_first_axis(1.0), PROCESS, x0, torch.tensor([0, 50, 99]))
    for stairs, row in zip(spread.patches, weights[..., 0], strict=True):
        shares, edges, _ = stairs.get_data()
        assert shares == pytest.approx(np.histogram(row, edges)[0] / 200)
    assert [text.get_text() for text in spread.get_legend().get_texts()] == [
        "t = 0", "t = 50", "t = 99"
    ]  # fmt: skip
    for i, line in enumerate(chain.lines):
        assert line.get_xdata()[[0, 12, 24]].tolist() == [0, 50, 99]
        assert np.allclose(line.get_ydata()[[0, 12, 24]], weights.mean(1)[:, i], atol=1e-6)
        x, y = chain.collections[i].get_paths()[0].vertices.T
        mean, std = weights[0, :, i].mean().item(), weights[0, :, i].std(correction=0).item()
        assert y[x == 0].min() == pytest.approx(max(0, mean - std), abs=1e-6)
        assert y[x == 0].max() == pytest.approx(min(1, mean + std), abs=1e-6)
    assert np.allclose(data.collections[0].get_array(), weights[0, :, 0])
    low, high = limits_of(x0)
    assert len(maps) == 3
    for axes in maps:
        image = axes.images[0].get_array()
        middles = torch.linspace(low[0], high[0], 201, dtype=torch.float64)[1::2]
        assert np.allclose(image, middles.sigmoid(), atol=1e-3)
        assert axes.images[0].get_extent() == pytest.approx([low[0], high[0], low[1], high[1]])
        assert axes.get_xlim() == pytest.approx((low[0], high[0]))
    assert bar.get_ylabel() == "weight of expert 0"


def test_figure_of_more_experts_shows_which_has_the_largest_weight():
    spread, chain, data, *maps, bar = gate_figure(constant(0, 1.0, 0), PROCESS, points()).axes
    assert len(spread.patches) == len(chain.lines) == 3
    assert (data.collections[0].get_array() == 1).all()
    assert all((axes.images[0].get_array() == 1).all() for axes in maps)
    names = [label.get_text() for label in bar.get_yticklabels()]
    assert names == ["expert 0", "expert 1", "expert 2"]


def test_figure_keeps_every_point_of_a_hard_gate():
    network = GatedExperts(3, width=8, depth=1, gating=(16,), gate=Top1())
    spread = gate_figure(network, PROCESS, points()).axes[0]
    for stairs in spread.patches:
        shares = stairs.get_data().values
        assert shares.sum() == pytest.approx(1) and not shares[1:-1].any()


def test_scatters_stand_side_by_side_in_one_frame(tmp_path):
    sets = [np.array([[0.0, 9.0]]), np.array([[9.0, 1.0], [50.0, 1.0]])]
    frame = (np.array([-1.0, -1.0]), np.array([11.0, 11.0]))
    save_scatters(sets, ["a", "b"], tmp_path / "row.png", frame)
    image = np.asarray(Image.open(tmp_path / "row.png").convert("RGB")).astype(int)
    assert image.shape == (180, 320, 3)
    blue = image[..., 2] - image[..., 0] > 40  # the dots, not the titles
    (upper, left), (lower, right) = (np.argwhere(part).mean(0) for part in np.hsplit(blue, 2))
    assert upper < 90 < lower and left < 80 < right


def test_a_picture_goes_to_the_run_s_folder_and_to_wandb(tmp_path):
    class Seen(WandbLogger):
        def __init__(self):
            pass

        def log_image(self, key, images, step):
            self.image = (key, images, step)

    trainer = SimpleNamespace(default_root_dir=tmp_path, global_step=7, loggers=[object(), Seen()])
    with picture_of_step(trainer, "gates", "gate") as path:
        assert path == tmp_path / "gates" / "step-00000007.png"
    assert trainer.loggers[1].image == ("pictures/gate", [str(path)], 7)


@pytest.mark.parametrize(
    "option, folders",
    [
        ("--model.network.experts=2", {"gates", "grids"}),
        ("--model.network=MLPDenoiser", {"grids"}),
        ("--model.seeds=[0, 1]", set()),
    ],
)
def test_pictures_are_drawn_after_each_validation_of_a_single_network(tmp_path, option, folders):
    options = {
        "config": ROOT / "configs/toys/dualdiff.yaml",
        "study.root": tmp_path,
        "study.iterations": 4,
        "data.samples": 500,
        "data.validation_samples": 200,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 2,
        "trainer.num_sanity_val_steps": 1,
        "trainer.logger": "JsonLines",
        "trainer.callbacks": "[{class_path: DenoisingGrid}, {class_path: GateMap}]",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items()), option]) == 0
    files = {f"{path.parent.name}/{path.name}" for path in tmp_path.rglob("*.png")}
    assert files == {f"{f}/step-0000000{step}.png" for f in folders for step in (2, 4)}
