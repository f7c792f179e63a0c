"""Training through the front door: exact resume, averaged weights, interruption."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from expertdiff import checkpoints
from expertdiff.callbacks.ema import EMA
from expertdiff.checkpoints import RAW
from expertdiff.cli import main
from expertdiff.metrics import read_metrics


def weights(folder, step):
    content = checkpoints.load(checkpoints.checkpoint_path(folder / "checkpoints", step))
    return content["state_dict"], content[RAW]


def assert_equal(a, b):
    for ours, theirs in zip(a, b):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    "options",
    [
        ("--model.expert=1",),
        ("--trainer.accumulate_grad_batches=3", "--model=Diffusion"),
        ("--trainer.precision=bf16-mixed", "--ema.warmup=false"),
    ],
    ids=["expert", "accumulate", "bf16"],
)
def test_eight_and_eight_steps_are_sixteen(tmp_path, options):
    def fit(name, steps):
        root = f"--study.root={tmp_path}"
        scheduler = "--model.lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
        options_ = [*options, scheduler, "--model.lr_scheduler.T_max=16", f"--study.name={name}"]
        from conftest import TINY

        assert main(["fit", *TINY, root, *options_, f"--trainer.max_steps={steps}"]) == 0
        (folder,) = (tmp_path / name).iterdir()
        return folder

    whole = fit("whole", 16)
    fit("halves", 8)
    halves = fit("halves", 16)
    assert_equal(weights(whole, 16), weights(halves, 16))
    averaged, raw = weights(whole, 16)
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (whole, halves)]
    for line in [*lines[0], *lines[1]]:
        line.pop("seconds"), line.pop("steps_per_second", None)
    assert lines[0] == lines[1]  # the same losses too, train and validation
    assert json.loads((halves / "done.json").read_text())["step"] == 16


class SignalAt(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_fit_start(self, trainer, pl_module):  # Lightning listens by now, training does not
        if self.step == -2:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *_):
        if self.step == -1 and trainer.global_step == 8:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "number, step",
    [
        (signal.SIGTERM, 5),
        (signal.SIGUSR1, 7),
        (signal.SIGINT, 6),
        (signal.SIGTERM, -1),
        (signal.SIGTERM, -2),
        (signal.SIGUSR1, -2),
    ],
)
def test_a_signal_stops_at_a_step_border_and_resumes_exactly(tmp_path, number, step, fit):
    interrupt = "--trainer.callbacks+=test_training.SignalAt"
    arguments = [
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.number={int(number)}",
        "--study.name=stopped",
        "--study.iterations=160",
    ]
    assert fit(interrupt, *arguments) == 75
    folder = tmp_path / "stopped" / "expert-0"
    assert not (folder / "done.json").exists()
    assert fit("--study.name=stopped", "--study.iterations=160") == 0
    assert fit("--study.name=whole", "--study.iterations=160") == 0
    assert_equal(weights(folder, 16), weights(tmp_path / "whole" / "expert-0", 16))


def test_ema_is_adm_s_recurrence(tmp_path, fit):
    decay = 0.9
    arguments = ["--ema.warmup=false", f"--ema.decay={decay}", "--checkpoint.keep=null"]
    arguments += ["--checkpoint.every_n_steps=1", "--study.iterations=50"]
    assert fit(*arguments) == 0
    folder = tmp_path / "tiny" / "expert-0"
    expected = None
    for step in range(1, 6):
        averaged, raw = weights(folder, step)
        if expected is None:  # theta_0 from ema_1 = d theta_0 + (1 - d) theta_1
            start = {k: (averaged[k] - (1 - decay) * raw[k]) / decay for k in raw}
            zero = "denoiser.network.out.2.weight"
            assert start[zero].abs().max() < 1e-6  # ADM starts it at 0, so theta_0 counts
            expected = start
        expected = {k: decay * expected[k] + (1 - decay) * raw[k] for k in raw}
        for key in raw:
            assert torch.allclose(averaged[key], expected[key], atol=1e-6), key


def test_ema_survives_other_callbacks(tmp_path, fit):
    assert fit("--trainer.callbacks=DenoisingGrid", "--study.iterations=50") == 0
    averaged, raw = weights(tmp_path / "tiny" / "expert-0", 5)
    assert any(not torch.equal(averaged[key], raw[key]) for key in raw)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(decay)


def test_experts_and_seeds_differ_from_the_start(tmp_path, fit):
    start = []
    for options in (("--model.expert=0",), ("--model.expert=2",), ("--seed_everything=1",)):
        name = f"--study.name=run{len(start)}"
        # a learning rate of 0 keeps the random start
        arguments = [*options, name, "--model.optimizer.lr=0", "--trainer.max_steps=1"]
        assert fit(*arguments) == 0
        (folder,) = (tmp_path / f"run{len(start)}").iterdir()
        start.append(weights(folder, 1)[1]["denoiser.network.time_embed.0.weight"])
    assert not torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])


def test_losses_by_interval(tmp_path, fit):
    assert fit("--model=Diffusion") == 0
    assert fit("--model.expert=1", "--study.iterations=23") == 0
    single = read_metrics(tmp_path / "tiny" / "baseline" / "metrics.jsonl")
    expert = read_metrics(tmp_path / "tiny" / "expert-1" / "metrics.jsonl")
    keys = {key for line in single for key in line if key.startswith("val/mse")}
    assert keys == {"val/mse/0", "val/mse/1", "val/mse/2"}
    keys = {key for line in expert for key in line if "/mse/" in key}
    assert keys == {"val/mse/1", "train/mse/1"}
    assert [line["step"] for line in single if "train/loss" in line] == list(range(2, 17, 2))


def test_the_loss_of_accumulated_batches_is_their_mean(tmp_path, fit):
    assert fit("--trainer.accumulate_grad_batches=2", "--model.weighting=Simple") == 0
    lines = read_metrics(tmp_path / "tiny" / "expert-0" / "metrics.jsonl")
    lines = [line for line in lines if "train/loss" in line]
    assert lines
    for line in lines:
        expected = line["train/mse/0"] + line["train/vb/0"]
        assert line["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_an_interval_without_timesteps_is_refused_before_training(tmp_path, fit, capsys):
    edges = "--model.partition.edges=[0,0.5,0.5001,1]"
    assert fit("--model=Diffusion", edges) == 2
    assert "interval (0.5, 0.5001] holds none of the 1000 timesteps" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "baseline" / "checkpoints").exists()
