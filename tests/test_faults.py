"""Faults of disks, folders, files and numbers: the right end, one sentence, and no lost work.

docs/faults.md lists every fault and the test that shows it.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from test_bundle import jobs, refused, rewrite
from test_training import assert_equal, weights

from expertdiff import checkpoints, files
from expertdiff.bundle import Bundle, Expert
from expertdiff.cli import main
from expertdiff.loggers import JsonLines
from expertdiff.methods.base import Method


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three experts and a baseline, trained in this process."""
    root = tmp_path_factory.mktemp("runs")
    for job in ("--model.expert=0", "--model.expert=1", "--model.expert=2", "--model=Diffusion"):
        assert main(["fit", *TINY, f"--study.root={root}", job]) == 0
    return root / "tiny"


@pytest.fixture
def copy(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "tiny")


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


class TestFolders:
    def test_a_full_disk_keeps_what_there_was(self, fit, tmp_path, capsys):
        assert fit("--trainer.max_steps=4") == 0
        job = tmp_path / "tiny" / "expert-0"
        before = {path: path.read_bytes() for path in (job / "checkpoints").iterdir()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no checkpoint is so small
        try:
            assert fit("--trainer.max_steps=8") == 74
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = last_line(capsys)
        assert f"{job}/checkpoints/step-00000008.ckpt" in error and "older files are" in error
        assert {path: path.read_bytes() for path in (job / "checkpoints").iterdir()} == before
        assert fit("--trainer.max_steps=8") == 0

    def test_a_line_of_metrics_that_cannot_be_written_is_told(self, tmp_path):
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(files.WriteFailed, match="metrics.jsonl .No space left"):
            JsonLines(tmp_path).log_metrics({"loss": 1.0}, 1)

    def test_an_output_that_cannot_be_is_refused_before_anything_is_drawn(self, copy, capsys):
        bundle = Bundle.stitch([copy / "baseline"], copy / "bundle").folder
        assert main(["sample", str(bundle), "--output=/dev/null/x"]) == 73
        assert "/dev/null/x cannot be written (Not a directory)" in last_line(capsys)

    def test_a_checkpoint_of_lightnings_requeueing_is_refused(self, tmp_path, capsys):
        path = tmp_path / "tiny" / "expert-0" / "hpc_ckpt_3.ckpt"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of expert 1, who knows")
        assert str(path) in refused(capsys, "fit", *TINY, f"--study.root={tmp_path}")

    @pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "ddp_spawn", "FSDPStrategy"])
    def test_strategies_that_split_a_model_are_refused(self, tmp_path, capsys, strategy):
        options = (f"--study.root={tmp_path}", f"--trainer.strategy={strategy}")
        error = refused(capsys, "fit", *TINY, *options)
        assert f"trainer.strategy {strategy}" in error and "use ddp" in error


class TestLock:
    @pytest.fixture
    def task(self, monkeypatch):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")

    def test_the_second_job_learns_who_is_first(self, tmp_path, task):
        who = rf"\(host {socket.gethostname()}, process {os.getpid()}, SLURM task 77_2\)"
        with files.locked(tmp_path), pytest.raises(files.Unusable, match=who):
            with files.locked(tmp_path):
                pass
        with files.locked(tmp_path):  # nothing stale is left
            pass

    @pytest.mark.parametrize("index, taken", [("2", True), ("1", False)])
    def test_a_requeued_task_takes_over_from_a_lost_node(
        self, tmp_path, task, monkeypatch, index, taken
    ):
        with monkeypatch.context() as other, files.locked(tmp_path):
            holder = json.loads((tmp_path / "lock").read_text()) | {"host": "lost"}
            (tmp_path / "lock").write_text(json.dumps(holder))
            other.setenv("SLURM_ARRAY_TASK_ID", index)
            if not taken:
                with pytest.raises(files.Unusable, match="host lost"):
                    files.locked(tmp_path).__enter__()
                return
            with files.locked(tmp_path), pytest.raises(files.Unusable, match="77_2"):
                other.setenv("SLURM_ARRAY_TASK_ID", "3")
                files.locked(tmp_path).__enter__()

    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch):
        def none(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", none)
        with pytest.warns(UserWarning, match="has no locks"), files.locked(tmp_path):
            pass


class TestResume:
    @pytest.fixture
    def root(self, copy, tmp_path):
        return f"--study.root={tmp_path}"

    @pytest.mark.parametrize(
        "key, value, said",
        [
            ("devices", 2, "devices: 1 != 2"),
            ("data", {"digest": "0" * 64}, "data.digest"),
        ],
    )
    def test_another_world_or_other_data(self, root, tmp_path, capsys, key, value, said):
        def change(content):
            identity = content[checkpoints.IDENTITY]
            identity[key] = identity[key] | value if key == "data" else value

        rewrite(tmp_path / "tiny" / "expert-0", change)
        assert said in refused(capsys, "fit", *TINY, root)

    def test_other_versions_are_warned_of(self, root, tmp_path):
        def change(content):
            content[checkpoints.IDENTITY]["versions"]["torch"] = "0.4"

        rewrite(tmp_path / "tiny" / "expert-0", change)
        with pytest.warns(UserWarning, match=r"other versions.torch: '.*' != '0.4'"):
            assert main(["fit", *TINY, root]) == 0

    def test_the_newest_is_that_of_the_highest_step_not_of_the_clock(self, root, tmp_path):
        folder = tmp_path / "tiny" / "baseline" / "checkpoints"
        steps = sorted(checkpoints.step_of(path) for path in folder.glob("*.ckpt"))
        for path in folder.glob(f"*{steps[-1]}.ckpt*"):
            os.utime(path, (0, 0))  # of a node whose clock is slow
        assert checkpoints.step_of(checkpoints.newest(folder)) == steps[-1] == 16
        old = checkpoints.checkpoint_path(folder, steps[0])
        shutil.copy(old, checkpoints.checkpoint_path(folder, 99))
        shutil.copy(f"{old}.json", f"{checkpoints.checkpoint_path(folder, 99)}.json")
        with pytest.warns(UserWarning, match="00000099.ckpt is of step 12, against its name"):
            assert checkpoints.step_of(checkpoints.newest(folder)) == 16

    def test_a_kill_in_the_very_first_save_starts_again(self, root, tmp_path):
        folder = tmp_path / "tiny" / "expert-0" / "checkpoints"
        for path in folder.glob("*.json"):
            path.unlink()
        with pytest.warns(UserWarning, match="step-00000002.ckpt is unfinished"):
            assert main(["fit", *TINY, root]) == 0
        assert checkpoints.newest(folder) is not None


class TestNotFinite:
    @pytest.mark.parametrize("window, last", [(2, 8), (50, 4)], ids=["by a line", "by a save"])
    def test_nothing_poisoned_stays(self, fit, tmp_path, capsys, monkeypatch, window, last):
        """One bad micro-batch; then the machine is well again, and no bit is lost."""
        options = ("--study.iterations=160", f"--trainer.log_every_n_steps={window}")
        assert fit("--study.name=whole", *options) == 0
        inner, bad = Method.training_step, 9 if window == 2 else 6

        def training_step(self, batch, batch_idx):
            outputs = inner(self, batch, batch_idx)
            return outputs | {"loss": outputs["loss"] * (torch.nan if batch_idx == bad else 1)}

        with monkeypatch.context() as broken:
            broken.setattr(Method, "training_step", training_step)
            assert fit(*options) == 70
        error = last_line(capsys)
        assert "expert-0 diverged" in error and "checkpoints before are whole" in error
        if window == 2:
            assert "in steps 9 to 10 (first nan in micro-batch 9, with t from " in error
        job = tmp_path / "tiny" / "expert-0"
        assert checkpoints.step_of(checkpoints.newest(job / "checkpoints")) == last
        assert all(v.isfinite().all() for kind in weights(job, last) for v in kind.values())
        assert fit(*options) == 0
        assert_equal(weights(job, 16), weights(tmp_path / "whole" / "expert-0", 16))

    def test_the_scale_of_float16_is_logged(self, fit, tmp_path, monkeypatch):
        from lightning.pytorch.plugins.precision import Precision

        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        monkeypatch.setattr(Precision, "scaler", scaler, raising=False)
        assert fit() == 0
        assert '"loss_scale": 512.0' in (tmp_path / "tiny/expert-0/metrics.jsonl").read_text()


class TestStitch:
    def stitch(self, capsys, copy, *extra):
        return refused(capsys, "stitch", *jobs(copy), "--output", copy / "new", *extra)

    def test_a_wrong_end_leaves_a_gap(self, copy, capsys):
        def change(content):
            identity = content[checkpoints.IDENTITY]
            identity["interval"], identity["partition"] = [0.1, 0.7], [0, 0.1, 0.7, 1]

        rewrite(copy / "expert-1", change)
        assert "no expert was given for interval 1 (0.1, 0.8]" in self.stitch(capsys, copy)

    def test_continuous_and_discrete(self, copy, capsys):
        def change(content):
            process = {"class_path": "expertdiff.diffusion.process.VPSDE", "init_args": {}}
            content[checkpoints.IDENTITY]["process"] = process

        rewrite(copy / "expert-2", change)
        error = self.stitch(capsys, copy)
        assert "DiscreteVP" in error and "VPSDE" in error and "expert-2" in error

    def test_a_renamed_copy_is_what_it_was(self, copy, capsys):
        shutil.rmtree(copy / "expert-2")
        shutil.copytree(copy / "expert-1", copy / "expert-2")
        error = self.stitch(capsys, copy)
        assert "both serve interval 1" in error and "expert-1/" in error and "expert-2/" in error

    def test_raw_beside_averaged(self, copy, capsys):
        def change(content):  # as a Trainer without our average writes it
            content["state_dict"] = content.pop(checkpoints.RAW)
            del content[checkpoints.IDENTITY]["ema"]

        rewrite(copy / "expert-1", change)
        error = self.stitch(capsys, copy)
        assert "expert-0/" in error and "holds averaged weights" in error
        assert "expert-1/" in error and "raw ones" in error

    @pytest.mark.parametrize(
        "key, name, value", [("ema", "decay", 0.5), ("versions", "torch", "0.4")]
    )
    def test_what_differs_but_fits_is_warned_of(self, copy, key, name, value):
        def change(content):
            content[checkpoints.IDENTITY][key][name] = value

        rewrite(copy / "expert-1", change)
        with pytest.warns(UserWarning, match=rf"expert-1/.* differ: {key}.{name}: .* != '?{value}"):
            bundle = Bundle.stitch(jobs(copy), copy / "new")
        assert bundle.manifest["experts"][1]["identity"][key][name] == value


class TestPublishedWeights:
    """A ``.pt`` that training starts from."""

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "weights.pt"

    def test_wrappers_are_taken_off(self, path):
        torch.save({"module._orig_mod.in.weight": torch.ones(2), "out.module": torch.ones(1)}, path)
        assert checkpoints.read_published(path).keys() == {"in.weight", "out.module"}

    def test_float16_is_converted_and_told(self, path):
        torch.save({"a": torch.full((2,), 0.5).half()}, path)
        with pytest.warns(UserWarning, match="weights.pt holds torch.float16: taken as float32"):
            assert checkpoints.read_published(path)["a"].dtype == torch.float32

    @pytest.mark.parametrize(
        "value, said",
        [
            (torch.ones(2).int(), "torch.int32 numbers"),
            (torch.ones(2) * 1j, "torch.complex64 numbers"),
            (torch.tensor([1.0, torch.nan]), "NaN or infinity"),
        ],
    )
    def test_what_is_no_weight_is_refused(self, path, value, said):
        torch.save({"a": value}, path)
        with pytest.raises(ValueError, match=f"weights.pt: a holds {said}"):
            checkpoints.read_published(path)

    def test_nothing_of_a_pickle_is_executed(self, path, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        torch.save({"model": {"a": Bomb()}}, path)
        with pytest.raises(ValueError, match=r"cannot read .*weights.pt"):
            checkpoints.read_published(path)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("extra", [True, False])
    def test_missing_and_extra_keys_are_named(self, trained, tmp_path, capsys, extra):
        content = Expert.read(trained / "baseline").weights
        key = "out.2.bias"
        content |= {"extra": content.pop(key)} if extra else {}
        content.pop(key, None)
        torch.save(content, tmp_path / "weights.pt")
        start = f"--model.init_from={tmp_path / 'weights.pt'}"
        error = refused(capsys, "fit", *TINY, f"--study.root={tmp_path}", start)
        assert ("extra" if extra else key) in error and "weights.pt" in error


def python(code):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests'); {code}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_random_interruptions_leave_every_bit(tmp_path):
    """tests/interruptions.py says what happens; it asserts exit codes and weights."""
    code = f"from interruptions import Path, interruptions; root = Path({str(tmp_path)!r});"
    code += "print(interruptions(6, 1, 5, root / 'one'), interruptions(3, 2, 5, root / 'two'))"
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    assert python(code).count("SIG") >= 2


RANKS = """
import json, os, signal, time
from pathlib import Path
import torch
from interruptions import KINDS, Method, start
root = Path({root!r})

def at(step, act):
    inner = Method.training_step
    def training_step(self, batch, batch_idx):
        if batch_idx == step:
            act()
        outputs = inner(self, batch, batch_idx)
        if batch_idx == step and act is nothing:
            outputs["loss"] = outputs["loss"] * torch.nan
        return outputs
    Method.training_step = training_step

nothing = lambda: None
faults = dict(
    nan=nothing,
    term=lambda: os.kill(os.getpid(), signal.SIGTERM),
    dies=lambda: os.kill(os.getpid(), signal.SIGKILL),
    hangs=lambda: (signal.alarm(25), time.sleep(1000)),  # its end is the launcher's or SLURM's
)
short = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:20"]
for name, act in faults.items():
    options = short if name == "hangs" else []
    codes = start(root / name, 2, lambda rank: rank and at(20, act), options)
    print(json.dumps([name, codes]))
"""


def test_a_fault_of_one_rank_ends_both(tmp_path):
    out = python(f"exec({RANKS.format(root=str(tmp_path))!r})")
    ends = dict(map(json.loads, out.splitlines()))
    assert ends["term"] == [75, 75]
    assert ends["nan"] == [70, 70]
    assert ends["dies"] == [1, -9]
    assert ends["hangs"] == [1, -14]
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in ends}
    assert logs["term"].count("stopped at step ") == 2
    assert len({line for line in logs["term"].splitlines() if "stopped at" in line}) == 1
    assert "first nan in micro-batch 20, with t from" in logs["nan"]
    for name in ("dies", "hangs"):
        assert "rank 0 of 2 of " in logs[name] and "baseline ends at step " in logs[name]
    path = checkpoints.newest(tmp_path / "dies" / "tiny" / "baseline" / "checkpoints")
    assert checkpoints.step_of(path) == 5
