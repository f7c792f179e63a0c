"""Two processes (gloo): the same samples and numbers, and different noise on each rank."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from expertdiff import checkpoints
from expertdiff.checkpoints import RAW
from expertdiff.data.base import Batch
from expertdiff.expert_cli import ConfigOnly
from expertdiff.methods.base import Method

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def expertdiff(*args):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "expertdiff", *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_test_does_not_depend_on_the_number_of_ranks(study, tmp_path):
    config = study / "bundles" / "stitched" / "config.yaml"
    out = expertdiff("test", "--config", config, f"--model.output={tmp_path}", *TWO)
    ours = json.loads((tmp_path / "metrics.json").read_text())
    theirs = json.loads((study / "tests" / "stitched" / "metrics.json").read_text())
    assert ours["values"] == pytest.approx(theirs["values"], rel=1e-6)
    assert out.count("over sampling seeds") == 1  # said once


def test_two_ranks_train_one_model(tmp_path):
    options = ["fit", *TINY, "--model.timesteps=LossSecondMoment", *TWO]
    expertdiff(*options, f"--study.root={tmp_path}", "--trainer.max_steps=8")
    job = tmp_path / "tiny" / "expert-0"
    content = checkpoints.load(checkpoints.newest(job / "checkpoints"))
    assert content[checkpoints.IDENTITY]["devices"] == 2
    assert json.loads((job / "done.json").read_text())["devices"] == 2
    # each has told the other the losses of its batch
    batch = ConfigOnly(TINY).datamodule.batch_size
    assert content["state_dict"]["timesteps.told"].sum() == 8 * 2 * batch
    # interrupted and resumed, they are the same bits
    root = f"--study.root={tmp_path / 'halves'}"
    expertdiff(*options, root, "--trainer.max_steps=4")
    expertdiff(*options, root, "--trainer.max_steps=8")
    again = checkpoints.load(
        checkpoints.newest(tmp_path / "halves" / "tiny" / "expert-0" / "checkpoints")
    )
    for kind in ("state_dict", RAW):
        for key, value in content[kind].items():
            assert torch.equal(value, again[kind][key]), key


def test_ranks_and_micro_batches_draw_their_own_t(monkeypatch):
    cli = ConfigOnly(TINY)
    module = cli.parser.instantiate_classes(cli.config).model
    batch = Batch(torch.zeros(8, 1, 8, 8), torch.zeros(8).long(), torch.arange(8))

    def drawn(rank, step, batch_idx):
        steps = {"global_step": step, "max_steps": 9}
        trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=2, **steps)
        monkeypatch.setattr(Method, "global_rank", rank)
        monkeypatch.setattr(Method, "trainer", trainer)
        return tuple(module.training_step(batch, batch_idx)["t"].tolist())

    points = [(0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1), (1, 1, 0)]
    assert len({drawn(*point) for point in points}) == 5
    # the micro-batch of the run counts, not how Lightning numbers batches within an epoch
    assert drawn(0, 1, 7) == drawn(0, 1, 1)
