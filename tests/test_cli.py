"""The front door: configs, faults, help, and the order of imports."""

import ast
import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY

import expertdiff
from expertdiff import checkpoints, cli, files
from expertdiff.__main__ import main as entry
from expertdiff.cli import main
from expertdiff.describe import build
from expertdiff.diffusion.partition import Partition
from expertdiff.expert_cli import ConfigOnly

SMALL = ROOT / "configs/cifar10/small.yaml"
"""Laid over another."""
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TAUGHT = {
    "decoupled.yaml": ("--model.init_from", "baseline"),
    "distillation.yaml": ("--model.teacher", "bundles/stitched"),
}


def layers(path: Path) -> list[list[Path]]:
    """`path` over each of the configs that its first line names, or alone."""
    first, _, _ = path.read_text().partition("\n")
    under = re.findall(r"\w+\.yaml", first) if first.startswith("# Laid over") else []
    return [[path.with_name(name), path] for name in under] or [[path]]


def refused(capsys, *args) -> str:
    """The one sentence with which the program refuses."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:  # of the argument parser
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("expertdiff: error: "), error
    return error


@pytest.mark.parametrize(
    "configs",
    [configs for path in CONFIGS for configs in layers(path)],
    ids=lambda configs: "+".join(str(path.relative_to(ROOT / "configs")) for path in configs),
)
def test_every_shipped_config_parses(configs, request):
    options = []
    if configs[-1].name in TAUGHT:  # names what is trained before, here by the tiny study
        configs = [*configs, ROOT / "tests/conf/tiny.yaml"]
        option, name = TAUGHT[configs[-2].name]
        options = [option, str(request.getfixturevalue("study") / name)]
    layered = [part for path in configs for part in ("--config", str(path))]
    cli = ConfigOnly([*layered, *options])
    assert cli.study.evaluation is not None
    assert sum(cli.study.budgets(partition_of(cli))) == cli.study.iterations


def partition_of(cli):
    return build(cli.resolved()["model"]["init_args"]["partition"], Partition)


def test_paper_budget():
    cli = ConfigOnly(["--config", str(ROOT / "configs/cifar10/mdm.yaml")])
    assert cli.study.budgets(partition_of(cli)) == [50_000, 350_000, 100_000]


@pytest.mark.parametrize("verb", ["launch", "status", "fit", "test", "stitch", "sample", "report"])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: expertdiff" in text
    assert main([]) == main(["--help"]) == 0
    assert f"  {verb} " in capsys.readouterr().out


class TestFaults:
    @pytest.mark.parametrize(
        "option",
        [
            "--model.expret=1",
            "--trainer.max_step=3",
            "--ema.deacy=0.9",
            "--study.nmae=x",
            "--foo=1",
        ],
    )
    def test_misspelt_key(self, option, capsys, tmp_path):
        error = refused(capsys, "fit", *TINY, f"--study.root={tmp_path}", option)
        assert option.split("=")[0].split(".")[-1].lstrip("-") in error
        assert not list(tmp_path.iterdir())

    def test_misspelt_key_in_a_file(self, capsys, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text("model:\n  init_args:\n    expret: 1\n")
        assert "expret" in refused(capsys, "launch", *TINY, "--config", path)

    def test_missing_config(self, capsys):
        assert "nowhere.yaml" in refused(capsys, "fit", "--config", "nowhere.yaml")

    def test_unknown_class(self, capsys):
        error = refused(capsys, "fit", *TINY, "--model.weighting=Simpel")
        assert "Simpel" in error

    def test_class_of_another_kind(self, capsys):
        assert "weighting" in refused(capsys, "fit", *TINY, "--model.weighting=Uniform")

    @pytest.mark.parametrize("verb", ["fit", "launch"])
    def test_edges(self, verb, capsys, tmp_path):
        edges = "--model.partition.edges=[0,0.8,0.1,1]"
        error = refused(capsys, verb, *TINY, f"--study.root={tmp_path}", edges)
        assert "[0.0, 0.8, 0.1, 1.0] do not partition (0, 1]" in error

    def test_no_such_expert(self, capsys, tmp_path):
        error = refused(capsys, "fit", *TINY, f"--study.root={tmp_path}", "--model.expert=3")
        assert "expert 3 does not exist" in error and "0 to 2" in error

    @pytest.mark.parametrize("budget", ["[8,8]", "[8,8,8]", "[0,8,8]"])
    def test_budget(self, budget, capsys, tmp_path):
        options = (f"--study.root={tmp_path}", f"--study.budget={budget}")
        assert "study.budget" in refused(capsys, "launch", *TINY, *options)

    @pytest.mark.parametrize("verb", ["fit", "launch"])
    def test_data_root(self, verb, capsys, tmp_path):
        config = ["--config", str(ROOT / "configs/cifar10/mdm.yaml"), "--config", str(SMALL)]
        data = [f"--data.root={tmp_path / 'nowhere'}", "--data.download=false"]
        data += ["--trainer.logger=JsonLines"]
        error = refused(capsys, verb, *config, *data, f"--study.root={tmp_path / 'runs'}")
        assert "nowhere" in error
        assert not list(tmp_path.glob("runs/*/study.json"))

    def test_network_of_other_data(self, capsys, tmp_path):
        root = f"--study.root={tmp_path}"
        error = refused(capsys, "fit", *TINY, root, "--model.network.in_channels=3")
        assert "cannot take data of shape (1, 8, 8)" in error
        error = refused(capsys, "fit", *TINY, root, "--model.network.num_classes=5")
        assert "num_classes 5, Digits has 10" in error

    @pytest.mark.parametrize("option", ["--trainer.max_steps=5", "--trainer.default_root_dir=x"])
    def test_one_setting_for_all_jobs(self, option, capsys, tmp_path):
        error = refused(capsys, "launch", *TINY, f"--study.root={tmp_path}", option)
        assert "cannot be the same for every job" in error

    def test_too_few_iterations(self, capsys, tmp_path):
        options = (f"--study.root={tmp_path}", "--study.iterations=4")
        assert "leave [0, 3, 1] " in refused(capsys, "fit", *TINY, *options)

    def test_coarse_precision(self, capsys, tmp_path):
        options = (f"--study.root={tmp_path}", "--trainer.precision=bf16-true")
        assert "use bf16-mixed" in refused(capsys, "fit", *TINY, *options)

    def test_a_root_that_cannot_be(self, capsys):
        for verb in ("fit", "launch"):
            assert main([verb, *TINY, "--study.root=/dev/null/x"]) == 73
            assert "/dev/null/x/tiny/expert-0 cannot be written (Not a directory)" in (
                capsys.readouterr().err.replace("x/tiny cannot", "x/tiny/expert-0 cannot")
            )

    def test_a_run_in_use(self, fit, tmp_path, capsys):
        with files.locked(tmp_path / "tiny" / "expert-0"):
            assert fit() == 73
        assert "in use by another job" in capsys.readouterr().err
        assert fit() == 0

    def test_unknown_verb(self, capsys):
        assert "'trian' is no verb" in refused(capsys, "trian")

    def test_image_of_another_size_is_no_defect_of_ours(self, capsys, tmp_path):
        network = "--model.network.image_size=9"
        assert "image_size 9" in refused(capsys, "fit", *TINY, f"--study.root={tmp_path}", network)

    @pytest.mark.parametrize("verb", ["test", "predict"])
    def test_a_method_is_not_tested(self, verb, capsys, tmp_path):
        error = refused(capsys, verb, *TINY, f"--study.root={tmp_path}")
        assert "MDM is trained, and its bundle is tested" in error and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("verb", ["launch", "intervals"])
    def test_a_bundle_is_not_trained(self, verb, study, capsys):
        config = study / "bundles/stitched/config.yaml"
        assert "Stitched trains nothing" in refused(capsys, verb, "--config", config)

    @pytest.mark.parametrize(
        "option", ["--trainer.fast_dev_run=true", "--trainer.limit_test_batches=1"]
    )
    def test_a_part_of_a_test(self, option, study, capsys, tmp_path):
        config = study / "bundles/stitched/config.yaml"
        assert "no test" in refused(capsys, "test", "--config", config, option)
        root = f"--study.root={tmp_path}"  # before anything is trained
        assert "no test" in refused(capsys, "launch", *TINY, root, option)
        assert not list(tmp_path.iterdir())

    def test_what_lightning_refuses(self, capsys, tmp_path):
        options = (f"--study.root={tmp_path}", "--trainer.accelerator=gpu")
        assert "No supported gpu backend" in refused(capsys, "fit", *TINY, *options)

    def test_unknown_precision(self, study, capsys):
        bundle = study / "bundles/stitched"
        assert "fp32" in refused(capsys, "sample", bundle, "--precision=fp32")

    def test_interrupted_anywhere(self, monkeypatch, capsys):
        def report(study: Path):
            raise KeyboardInterrupt

        monkeypatch.setitem(cli.VERBS, "report", report)
        assert main(["report", "runs/x"]) == 75
        assert "what was finished is kept" in capsys.readouterr().err


def test_a_class_of_a_file_beside_the_user(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(# mine.py\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    options = ["--model.weighting=mine.Faded", "--model.weighting.power=2", "--trainer.max_steps=2"]
    monkeypatch.setattr(sys, "argv", ["expertdiff", "fit", *TINY, *options])
    assert entry() == 0
    told = yaml.safe_load((tmp_path / "runs/tiny/expert-0/config.yaml").read_text())
    assert told["model"]["init_args"]["weighting"]["class_path"] == "mine.Faded"


class TestOtherRun:
    """A folder keeps what it has: nothing resumes into another run."""

    @pytest.fixture
    def root(self, study, tmp_path):
        shutil.copytree(study, tmp_path / "tiny")
        return f"--study.root={tmp_path}"

    @pytest.mark.parametrize(
        "option, name",
        [
            ("--model.network.model_channels=16", "model_channels: 16 != 8"),
            ("--model.optimizer.lr=0.5", "optimizer.lr: 0.5 != 0.001"),
            ("--model.process.T=500", "process.T: 500 != 1000"),
            ("--model.weighting=P2", "weighting.class_path"),
            ("--model.partition.edges=[0,0.2,1]", "interval"),
            ("--data.batch_size=4", "batch_size: 4 != 8"),
            ("--seed_everything=5", "seeds: [5] != [0]"),
            ("--ema.decay=0.5", "ema.decay: 0.5 != 0.999"),
            ("--trainer.precision=bf16-mixed", "precision"),
            ("--trainer.accumulate_grad_batches=2", "accumulate_grad_batches: 2 != 1"),
            ("--model.optimizer.betas=[0.5,0.5]", "optimizer.betas: [0.5, 0.5] != [0.9, 0.999]"),
        ],
    )
    def test_fit_refuses_to_resume(self, root, option, name, capsys, tmp_path):
        before = checkpoints.newest(tmp_path / "tiny" / "expert-0" / "checkpoints")
        error = refused(capsys, "fit", *TINY, root, option)
        assert name in error and "another name" in error
        assert checkpoints.newest(tmp_path / "tiny" / "expert-0" / "checkpoints") == before

    def test_launch_refuses_another_study(self, root, capsys):
        error = refused(capsys, "launch", *TINY, root, "--model.network.model_channels=16")
        assert "holds another study" in error and "model_channels: 16 != 8" in error

    def test_wrong_expert(self, root, capsys, tmp_path):
        shutil.rmtree(tmp_path / "tiny" / "expert-0")
        shutil.copytree(tmp_path / "tiny" / "expert-1", tmp_path / "tiny" / "expert-0")
        assert "job: 'expert-0' != 'expert-1'" in refused(capsys, "fit", *TINY, root)


def test_validate_prints_losses_of_the_newest_checkpoint(fit, tmp_path, capsys):
    options = [f"--study.root={tmp_path}", "--study.iterations=40"]
    assert "no checkpoint" in refused(capsys, "validate", *TINY, *options)
    assert fit("--study.iterations=40") == 0
    metrics = (tmp_path / "tiny" / "expert-0" / "metrics.jsonl").read_text()
    last = [json.loads(line) for line in metrics.splitlines() if "val/mse/0" in line][-1]
    assert last["step"] == 4
    capsys.readouterr()
    assert main(["validate", *TINY, *options]) == 0
    value = float(capsys.readouterr().out.split("val/mse/0: ")[1].split()[0])
    assert value == pytest.approx(last["val/mse/0"], abs=1e-5)  # the same weights, noise and t
    assert (tmp_path / "tiny" / "expert-0" / "metrics.jsonl").read_text() == metrics


class TestCheckpoints:
    def test_full_disk_keeps_the_older_one(self, fit, tmp_path, monkeypatch, capsys):
        assert fit("--trainer.max_steps=4") == 0
        folder = tmp_path / "tiny" / "expert-0" / "checkpoints"
        before = {p.name: p.read_bytes() for p in folder.iterdir()}

        def full(value, path):
            Path(path).write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        capsys.readouterr()
        assert fit("--trainer.max_steps=8") == 74
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "step-00000008.ckpt (No space left on device)" in error
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        monkeypatch.undo()
        assert fit("--trainer.max_steps=8") == 0

    def test_a_damaged_newest_falls_back_loudly(self, fit, tmp_path):
        assert fit("--trainer.max_steps=8") == 0
        job = tmp_path / "tiny" / "expert-0"
        newest = checkpoints.newest(job / "checkpoints")
        newest.write_bytes(newest.read_bytes()[:-5])
        with pytest.warns(UserWarning, match=r"step-00000008.ckpt has \d+ bytes instead of"):
            assert fit("--trainer.max_steps=8") == 0
        assert json.loads((job / "done.json").read_text())["step"] == 8

    def test_killed_between_file_and_record(self, fit, tmp_path):
        assert fit("--trainer.max_steps=8") == 0
        folder = tmp_path / "tiny" / "expert-0" / "checkpoints"
        (folder / "step-00000008.ckpt.json").unlink()
        with pytest.warns(UserWarning, match="is unfinished"):
            assert checkpoints.newest(folder).name == "step-00000004.ckpt"

    def test_replacing_leaves_nothing_behind(self, tmp_path):
        (tmp_path / "a").write_text("old")
        with pytest.raises(RuntimeError), files.replacing(tmp_path / "a") as temporary:
            temporary.write_text("new, but")
            raise RuntimeError
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "old"

    def test_full_disk_while_the_record_is_written(self, fit, tmp_path, monkeypatch, capsys):
        assert fit("--trainer.max_steps=4") == 0

        def full(path, value):
            raise files.WriteFailed(path, OSError(errno.ENOSPC, "No space left on device"))

        monkeypatch.setattr(checkpoints, "write_json", full)
        assert fit("--trainer.max_steps=8") == 74
        assert "older files are untouched" in capsys.readouterr().err
        monkeypatch.undo()
        folder = tmp_path / "tiny" / "expert-0" / "checkpoints"
        with pytest.warns(UserWarning, match="is unfinished"):
            assert checkpoints.newest(folder).name == "step-00000004.ckpt"

    def test_a_damaged_later_one_is_set_aside(self, fit, tmp_path):
        assert fit("--trainer.max_steps=8", "--checkpoint.keep=null") == 0
        folder = tmp_path / "tiny" / "expert-0" / "checkpoints"
        newest = checkpoints.newest(folder)
        newest.write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="bytes instead of"):
            assert fit("--trainer.max_steps=6", "--checkpoint.keep=1") == 0
        assert checkpoints.newest(folder).name == "step-00000006.ckpt"
        assert (folder / "step-00000008.ckpt.aside").exists()

    def test_a_kill_before_the_record_is_repaired(self, fit, tmp_path):
        assert fit() == 0
        done = tmp_path / "tiny" / "expert-0" / "done.json"
        first = json.loads(done.read_text())
        done.unlink()
        assert fit() == 0
        again = json.loads(done.read_text())
        assert again["sha256"] == first["sha256"] and again["step"] == 2
        assert again["seconds"] == pytest.approx(first["seconds"], abs=0.5)

    def test_stopped_by_the_clock_is_not_finished(self, fit, tmp_path):
        assert fit("--trainer.max_time=00:00:00:02", "--study.iterations=100000") == 75
        job = tmp_path / "tiny" / "expert-0"
        assert checkpoints.newest(job / "checkpoints") and not (job / "done.json").exists()

    def test_divergence_is_not_saved(self, fit, tmp_path, capsys):
        assert fit("--model.optimizer.lr=1e30") == 70
        assert "diverged" in capsys.readouterr().err
        assert checkpoints.newest(tmp_path / "tiny" / "expert-0" / "checkpoints") is None


LAYERS = [
    {"seeds", "devices", "describe", "files", "look", "memory", "metrics", "cluster", "int8"},
    {"diffusion", "networks", "checkpoints", "image_files"},
    {"experts", "data", "evaluation", "budgets"},
    {"bundle", "loggers"},
    {"discriminator"},
    {"methods"},
    {"analysis"},
    {"callbacks", "study", "report", "status"},
    {"jobs", "verbs", "measure", "studies"},
    {"rounds"},
    {"launch"},
    {"tables", "expert_cli"},
    {"config_verbs"},
    {"cli"},
    {"__main__"},
]
WITHOUT_LIGHTNING = {
    "diffusion",
    "networks",
    "experts",
    "bundle",
    "checkpoints",
    "evaluation",
    "discriminator",
}


def test_imports_point_one_way():
    package = Path(expertdiff.__file__).parent
    level = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
    seen = set()
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        seen.add(room)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
                if node.module == "expertdiff":
                    names = [f"expertdiff.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "expertdiff" and len(parts) > 1 and parts[1] != room:
                    where = f"{path.relative_to(package)} imports {name}"
                    assert level[parts[1]] < level[room], where
                if room in WITHOUT_LIGHTNING:
                    assert parts[0] not in ("lightning", "wandb"), f"{path} imports {name}"
    assert seen == set(level)


def test_nothing_bears_a_name_that_its_source_does_not_define():
    """LDMSE, LPD and floor plans are names without a definition: docs/curricula.md says so."""
    package = Path(expertdiff.__file__).parent
    files_ = [*package.rglob("*.py"), *package.rglob("*.yaml"), *CONFIGS]
    words = {word for path in files_ for word in re.findall(r"\w+", path.read_text().lower())}
    parts = {part for word in words for part in word.split("_")}
    assert "minsnr" in words
    assert not {word for word in words if "ldmse" in word or "floor_plan" in word}
    assert not {part for part in parts if part.startswith("lpd") or part == "floorplan"}
