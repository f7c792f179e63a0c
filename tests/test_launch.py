"""A study from the front door: finished work is kept, failures are told, results are honest."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from expertdiff import checkpoints
from expertdiff.bundle import Bundle, Expert
from expertdiff.cli import main
from expertdiff.diffusion.partition import Partition
from expertdiff.evaluation.features import Pixels
from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.image_files import load_npz
from expertdiff.jobs import Job, _complain, _slots, run
from expertdiff.metrics import read_metrics
from expertdiff.report.study import read_study
from expertdiff.report.verdict import cost, missing, verdict
from expertdiff.study import Study


def modified(folder):
    """When each result was last written."""
    names = ("*.ckpt", "done.json", "metrics.json", "*.safetensors")
    return {path: path.stat().st_mtime_ns for name in names for path in folder.rglob(name)}


def test_trains_stitches_tests_and_reports(study):
    for job, steps in {"expert-0": 2, "expert-1": 11, "expert-2": 3, "baseline": 16}.items():
        assert json.loads((study / job / "done.json").read_text())["step"] == steps
    assert len(Bundle.load(study / "bundles" / "stitched").manifest["experts"]) == 3
    assert missing(read_study(study)) == []
    page = (study / "report.html").read_text()
    assert "FD-pixels" in page and "FID" not in page


def test_again_redoes_nothing(study, capfd):
    before = modified(study)
    assert main(["launch", *TINY, f"--study.root={study.parent}"]) == 0
    assert {p: t for p, t in modified(study).items() if p.suffix != ".safetensors"} == {
        p: t for p, t in before.items() if p.suffix != ".safetensors"
    }
    assert "finished before" in capfd.readouterr().out


def test_numbers_say_how_they_were_made(study):
    result = json.loads((study / "tests" / "stitched" / "metrics.json").read_text())
    assert result["metric"] == "FD-pixels" and result["nfe"] == 4
    assert result["calls"] == [1, 2, 1] and sum(result["calls"]) == result["nfe"]
    assert result["seeds"] == [0, 1] and len(result["values"]) == 2 and result["samples"] == 20
    assert result["reference"] == "validation" and result["reference_samples"] == 500
    assert result["mean"] == pytest.approx(np.mean(result["values"]))
    assert result["std"] == pytest.approx(np.std(result["values"], ddof=1))
    assert result["steps"] == {"expert-0": 2, "expert-1": 11, "expert-2": 3}


def test_distance_is_that_of_the_drawn_images(study, tmp_path):
    # `sample` with the sampler and seed of the test draws the same images.
    arguments = ["--sampler=DDIM", "--sampler.steps=4", "--seed=1", "--samples=20"]
    bundle = str(study / "bundles" / "stitched")
    assert main(["sample", bundle, *arguments, "--batch_size=7", f"--output={tmp_path}"]) == 0
    images, _ = load_npz(tmp_path / "samples.npz")
    from expertdiff.data.images import Digits

    real = Statistics.of(Pixels()(Digits().split("reference")[0]))
    ours = frechet_distance(Statistics.of(Pixels()(images)), real)
    result = json.loads((study / "tests" / "stitched" / "metrics.json").read_text())
    # kernels differ by batch size in the last bits, and a pixel may fall to the next integer
    assert ours == pytest.approx(result["values"][1], rel=1e-3)


def test_sample_writes_a_grid_and_adm_s_npz(study, tmp_path):
    bundle = str(study / "bundles" / "baseline")
    assert main(["sample", bundle, "--samples=5", f"--output={tmp_path}", "--sampler=DDIM"]) == 0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (5, 8, 8, 1) and file["arr_0"].dtype == np.uint8
    assert min(Image.open(tmp_path / "samples.png").size) >= 64


def test_test_verb_on_a_bundle_s_own_config(study, tmp_path, capsys):
    config = str(study / "bundles" / "stitched" / "config.yaml")
    assert main(["test", "--config", config, f"--model.output={tmp_path}"]) == 0
    ours = json.loads((tmp_path / "metrics.json").read_text())
    theirs = json.loads((study / "tests" / "stitched" / "metrics.json").read_text())
    assert ours["values"] == pytest.approx(theirs["values"], rel=1e-6)
    assert "real ones of the other split" in capsys.readouterr().out


def test_raw_weights_are_tested_too(study, tmp_path):
    bundle = shutil.copytree(study / "bundles" / "stitched", tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["experts"]:
        del entry["identity"]["ema"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["test", f"--config={bundle / 'config.yaml'}", f"--model.bundle={bundle}"]) == 0
    assert json.loads((bundle / "test" / "metrics.json").read_text())["ema_decay"] is None


def test_predict_gives_indices_and_images(study):
    from lightning.pytorch import Trainer

    from expertdiff.diffusion.samplers import DDIM
    from expertdiff.methods.stitched import Evaluation, Stitched

    protocol = Evaluation(DDIM(2), Pixels(), samples=5, seeds=(0,), batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    batches = trainer.predict(Stitched(study / "bundles" / "stitched", protocol))
    assert torch.cat([index for index, _, _ in batches]).tolist() == [0, 1, 2, 3, 4]
    assert [len(images) for _, images, _ in batches] == [2, 2, 1]


def test_another_reference_resolution_is_refused(study, capsys, tmp_path):
    for k in range(4):
        for split in ("train", "validation"):
            path = tmp_path / "images" / split / "a" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), k, np.uint8)).save(path)
    config = str(study / "bundles" / "stitched" / "config.yaml")
    options = [f"--data.root={tmp_path / 'images'}", "--data.image_size=16", "--data.channels=1"]
    code = main(["test", "--config", config, "--data=ImageFolder", *options])
    assert code == 2 and "[1, 16, 16]" in capsys.readouterr().err


def test_one_failure_leaves_the_others(tmp_path, capfd):
    # Expert 1 cannot start: its checkpoint folder is a file.
    job = tmp_path / "tiny" / "expert-1"
    job.mkdir(parents=True)
    (job / "checkpoints").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        main(["launch", *TINY, f"--study.root={tmp_path}", "--study.baseline=false"])
    assert stop.value.code not in (0, 75)
    for name in ("expert-0", "expert-2"):
        assert (tmp_path / "tiny" / name / "done.json").exists()
    out = capfd.readouterr().out
    assert "expert-1 failed with exit code" in out and "log.txt" in out
    assert f"expertdiff fit --config {job / 'job.yaml'}" in out
    assert not (tmp_path / "tiny" / "bundles").exists()


def test_experts_start_from_what_they_share(tmp_path):
    options = [f"--study.root={tmp_path}", "--study.shared=6", "--study.budget=[1,8,1]"]
    assert main(["launch", *TINY, *options]) == 0
    folder = tmp_path / "tiny"
    first = Expert.read(folder / "shared")
    assert first.step == 6
    bundle = Bundle.load(folder / "bundles" / "stitched")
    for entry in bundle.manifest["experts"]:
        assert entry["identity"]["init_from"] == first.sha256
    # One small step away from those weights, not from its own first ones.
    ours, theirs = Expert.read(folder / "expert-0").weights, first.weights
    far = Expert.read(folder / "baseline").weights
    for key, weight in theirs.items():
        assert (ours[key] - weight).abs().max() < 2e-3
    assert any((far[key] - weight).abs().max() > 2e-2 for key, weight in theirs.items())
    study = read_study(folder)
    assert missing(study) == []
    spent = cost(study, study.results["stitched"])
    assert (spent.total, spent.longest, spent.ntc, spent.nwct) == (16, 14, 100, 87.5)
    assert "at equal total iterations" in verdict(study)


def test_a_shared_start_that_would_be_none_is_refused(tmp_path, capsys):
    options = [*TINY, f"--study.root={tmp_path}", "--study.shared=6"]
    assert main(["fit", *options]) == 2
    assert "is not trained" in capsys.readouterr().err
    assert main(["launch", *options, "--ema.decay=0.99", "--ema.warmup=false"]) == 2
    assert "still 94 % random" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
    toy = ["--config", str(ROOT / "configs/toys/dualdiff.yaml"), f"--study.root={tmp_path}"]
    assert main(["launch", *toy, "--study.shared=6"]) == 2
    assert "set it to 0" in capsys.readouterr().err


def test_weights_of_another_network_are_no_start(study, tmp_path, capsys):
    options = [f"--study.root={tmp_path}", f"--model.init_from={study / 'baseline'}"]
    code = main(["fit", *TINY, *options, "--model.network.model_channels=64"])
    error = capsys.readouterr().err
    assert code == 2 and "cannot start from" in error and "instead of" in error


def test_an_interrupted_launch_goes_on(tmp_path):
    options = [f"--study.root={tmp_path}", "--study.iterations=4000", "--study.baseline=false"]
    command = [sys.executable, "-m", "expertdiff", "launch", *TINY, *options, "--parallel=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "tiny" / "expert-1"  # the longest is first
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/*.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "goes on from there" in out
    assert list(folder.glob("checkpoints/*.json")) and not (folder / "done.json").exists()
    # no orphan goes on training
    before = (folder / "metrics.jsonl").read_text()
    time.sleep(1)
    assert (folder / "metrics.jsonl").read_text() == before
    # the same command goes on from there
    stopped = checkpoints.step_of(checkpoints.newest(folder / "checkpoints"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(read_metrics(folder / "metrics.jsonl")) <= len(before.splitlines()):
        assert process.poll() is None and time.monotonic() < deadline + 120
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGHUP)  # a closed terminal
    assert process.wait(timeout=60) == 75
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == sorted(steps) and steps[-1] > stopped


@pytest.mark.parametrize(
    "devices, parallel, slots",
    [
        ("auto", None, ["4", "5", "6", "7"]),
        ("auto", 6, ["4", "5", "6", "7", "4", "5"]),
        (2, None, ["4,5", "6,7"]),
        (3, None, ["4,5,6"]),
        (2, 3, ["4,5", "6,7", "4,5"]),
    ],
)
def test_each_job_has_the_gpus_that_it_asks_for(devices, parallel, slots, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    jobs = [Job("a", "fit", {"trainer": {"devices": devices}}, tmp_path, 1)]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in _slots(jobs, parallel)] == slots
    for trainer in ({}, {"devices": 5, "accelerator": "cpu"}):
        jobs.append(Job("b", "fit", {"trainer": trainer}, tmp_path, 1))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in _slots(jobs, parallel)] == slots
    jobs.append(Job("c", "fit", {"trainer": {"devices": 5}}, tmp_path, 1))
    with pytest.raises(ValueError, match="devices 5 are more than the 4 GPUs"):
        _slots(jobs, parallel)


def test_exit_code_is_the_worst_of_the_jobs(tmp_path, capfd):
    wrong = {"trainer": {"devices": "auto"}, "nonsense": 0}
    jobs = [Job(f"job-{i}", "fit", wrong, tmp_path / str(i), 1) for i in range(2)]
    with pytest.raises(SystemExit) as stop:
        run(jobs)
    assert stop.value.code == 2 and "nonsense" in capfd.readouterr().out


@pytest.mark.parametrize("codes, told", [([75, 75], 75), ([75, 2], 2), ([75, -9], 137)])
def test_a_killed_job_is_told_as_by_a_shell(codes, told, tmp_path, capsys):
    jobs = [Job("a", "fit", {}, tmp_path, 1, SimpleNamespace(returncode=code)) for code in codes]
    with pytest.raises(SystemExit) as stop:
        _complain(jobs)
    assert (
        stop.value.code == told and f"a failed with exit code {codes[1]}" in capsys.readouterr().out
    )


class TestBudgets:
    def test_what_is_shared_is_a_part_of_the_total(self):
        partition = Partition([0, 0.1, 0.8, 1])
        assert Study(iterations=100, shared=20).budgets(partition) == [8, 56, 16]
        for shared in (-1, 100):
            with pytest.raises(ValueError, match=f"study.shared {shared} must be in"):
                Study(iterations=100, shared=shared).budgets(partition)

    @pytest.mark.parametrize("edges", [[0, 0.1, 0.8, 1], [k / 7 for k in range(7)] + [1]])
    def test_proportional_sums_to_the_total(self, edges):
        partition = Partition(edges)
        for iterations in (1000, 1001, 500_000):
            budgets = Study(iterations=iterations).budgets(partition)
            assert sum(budgets) == iterations
            for budget, interval in zip(budgets, partition.intervals()):
                assert abs(budget - (interval.hi - interval.lo) * iterations) <= 1

    def test_explicit(self):
        study = Study(iterations=10, budget=[5, 4, 1])
        assert study.budgets(Partition([0, 0.1, 0.8, 1])) == [5, 4, 1]
        with pytest.raises(ValueError, match="names 3 experts"):
            study.budgets(Partition([0, 0.5, 1]))
