"""Runs in W&B: real ones, kept offline and read back from their files."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from offline_runs import offline_runs

import expertdiff.loggers
from expertdiff.cli import main
from expertdiff.loggers import WandB, read_metrics
from expertdiff.report.dashboard import dashboard

LOGGERS = "--trainer.logger=[{class_path: JsonLines}, {class_path: WandB, init_args: {tags: [t]}}]"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    import wandb

    wandb.finish()
    wandb.teardown()


def key_without_a_network(monkeypatch) -> str:
    """An account whose service takes connections and never answers."""
    key = "0123456789abcdef" * 2 + "76543210"
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(expertdiff.loggers, "PATIENCE", 1)
    monkeypatch.setattr(key_without_a_network, "server", server, raising=False)
    return key


def test_a_requeued_job_is_one_run_whose_steps_go_on(fit, tmp_path):
    import wandb

    for steps in (4, 8):
        assert fit(LOGGERS, "--model.expert=1", f"--trainer.max_steps={steps}") == 0
        wandb.finish()
    job = tmp_path / "tiny" / "expert-1"
    first, second = offline_runs(job)
    assert first.id == second.id == f"tiny-expert-1-{(job / 'wandb_id').read_text()}"
    for run, steps in ((first, [2, 4]), (second, [6, 8])):
        assert (run.group, run.job_type, run.tags) == ("tiny", "expert-1", ["t"])
        assert [step for step, _ in run.history["train/loss"]] == steps
        assert run.axes["*"] == "trainer/global_step" and run.hidden == {"seconds"}
        sections = {key.split("/")[0] for key in run.history}
        assert sections == {"train", "val", "pictures", "seconds", "steps_per_second"}
        ((at, picture),) = run.history["pictures/denoising"]
        assert at == steps[-1] and picture["_type"] == "images/separated"
        (name,) = picture["filenames"]
        assert (run.folder / "files" / name).read_bytes() == (
            job / "grids" / f"step-{at:08d}.png"
        ).read_bytes()
    # The same numbers as in the file beside the run.
    lines = read_metrics(job / "metrics.jsonl")
    for key in ("train/mse/1", "val/mse/1", "steps_per_second"):
        logged = [*first.history[key], *second.history[key]]
        assert logged == [(line["step"], line[key]) for line in lines if key in line]
    assert second.config["model"]["init_args"]["expert"] == 1
    assert second.config["trainer"]["max_steps"] == 8
    assert second.config["study"]["name"] == "tiny"


def test_the_coefficients_of_mixed_experts_are_pictures_there_too(tmp_path):
    import wandb

    configs = [
        f"--config={ROOT / path}" for path in ("configs/toys/remix.yaml", "tests/conf/toy.yaml")
    ]
    small = ["--model.network.experts=8", "--model.network.network.width=32"]
    assert main(["fit", *configs, *small, f"--study.root={tmp_path}", LOGGERS]) == 0
    wandb.finish()
    job = tmp_path / "moons-remix" / "remix"
    (run,) = offline_runs(job)
    pictures = run.history["pictures/mixing"]
    assert [step for step, _ in pictures] == [4, 8, 12]
    for step, picture in pictures:
        (name,) = picture["filenames"]
        ours = job / "mixing" / f"step-{step:08d}.png"
        assert (run.folder / "files" / name).read_bytes() == ours.read_bytes()
    assert [step for step, _ in run.history["mixing/basis_cosine"]] == [4, 8, 12]


def test_a_key_without_a_network_goes_offline_and_stays_secret(fit, tmp_path, monkeypatch):
    key = key_without_a_network(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(LOGGERS, "--trainer.max_steps=2") == 0
    assert len([w for w in caught if "W&B is offline" in str(w.message)]) == 1
    import wandb

    wandb.finish()
    job = tmp_path / "tiny" / "expert-0"
    (run,) = offline_runs(job)
    assert [step for step, _ in run.history["train/loss"]] == [2]
    files = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    assert run.folder / "logs" / "debug-internal.log" in files
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_a_folder_that_cannot_be_written_stops_nothing(fit, tmp_path):
    job = tmp_path / "tiny" / "expert-0"
    job.mkdir(parents=True)
    (job / "wandb").write_text("no folder")
    with pytest.warns(UserWarning, match="without W&B, which cannot write.*expert-0/wandb"):
        assert fit(LOGGERS, "--trainer.max_steps=2") == 0
    assert json.loads((job / "done.json").read_text())["step"] == 2


def reset(*args, **kwargs):
    raise ConnectionResetError("Connection lost")


def test_a_service_that_is_dead_at_the_end_stops_nothing():
    logger = WandB(offline=True)
    logger._experiment = SimpleNamespace(finish=reset)
    with pytest.warns(UserWarning, match="goes on without W&B: Connection lost"):
        logger.finish()


def test_a_service_that_dies_stops_nothing(fit, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", reset)
    with pytest.warns(UserWarning, match="goes on without W&B: Connection lost") as caught:
        assert fit(LOGGERS, "--trainer.max_steps=2") == 0
    wandb.finish()
    assert len([w for w in caught if "Connection lost" in str(w.message)]) == 1
    assert json.loads((tmp_path / "tiny/expert-0/done.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    "account, wanted, offline, mode",
    [
        (True, None, False, "online"),
        (True, None, True, "offline"),
        (True, "offline", False, "offline"),
        (False, "online", False, "offline"),  # it would ask for a key
        (False, "run", False, "offline"),
        (False, "disabled", False, "disabled"),
    ],
)
def test_online_only_with_an_account(monkeypatch, tmp_path, account, wanted, offline, mode):
    if wanted:
        monkeypatch.setenv("WANDB_MODE", wanted)
    if account:
        (tmp_path / "none").write_text("machine api.wandb.ai login user password secret\n")
    assert WandB(offline=offline)._wandb_init["mode"] == mode


def test_the_summary_run_is_the_report(study, tmp_path, capsys):
    folder = tmp_path / "my runs" / "tiny"
    shutil.copytree(study, folder)
    (folder / "compare").mkdir()
    table = "model,iterations,NTC,NWCT,FD-pixels,FD-pixels std\ntiny experts,8,50,25,3.5,\n"
    (folder / "compare" / "table.csv").write_text(table)
    dashboard(folder, [{"class_path": "expertdiff.loggers.WandB", "init_args": {}}])
    (run,) = offline_runs(folder / "summary")
    assert (run.group, run.job_type) == ("tiny", "summary")
    assert run.config["partition"] == [0, 0.1, 0.8, 1] and "FD-pixels" in run.config["verdict"]
    assert run.history["distance/FD-pixels/tiny experts"] == [(8, 3.5)]
    for name in ("stitched", "baseline"):
        result = json.loads((folder / "tests" / name / "metrics.json").read_text())
        assert run.history[f"distance/FD-pixels/{name}"] == [(16, result["mean"])]
        assert run.history[f"cost/NTC/{name}"] == [(16, 100)]
        assert run.history[f"pictures/{name}"][0][0] == 16
    media = run.folder / "files" / "media"
    tables = {key: table_of(media, key) for key in ("distances", "costs", "jobs")}
    assert [row[0] for row in tables["costs"]["data"]] == ["baseline", "stitched"]
    columns = tables["jobs"]["columns"]
    row = dict(zip(columns, next(r for r in tables["jobs"]["data"] if r[0] == "expert-1")))
    done = json.loads((folder / "expert-1" / "done.json").read_text())
    assert row == {"job": "expert-1", "from": 0.1, "to": 0.8, "iterations": 11, "steps": 11} | {
        "seconds": done["seconds"], "devices": 1, "NTC": 100 * 11 / 16,
    }  # fmt: skip
    (page,) = media.glob("html/*.html")
    assert page.read_text() == (folder / "report.html").read_text()
    check_sync(capsys.readouterr().out, run.folder)


def table_of(media: Path, key: str) -> dict:
    (path,) = media.glob(f"table/tables/{key}_*.json")
    return json.loads(path.read_text())


def check_sync(out: str, folder: Path) -> None:
    """The printed command means this run and no other; W&B itself says so."""
    (line,) = [line for line in out.splitlines() if "wandb sync" in line]
    command = line.partition("wandb sync ")[2]
    shown = subprocess.run(
        f"{shlex.quote(sys.executable)} -m wandb sync --dry-run {command}",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    said = shown.stdout + shown.stderr
    assert shown.returncode == 0 and folder.name in "".join(said.split()), said


def test_nothing_to_upload_is_not_mentioned(study, capsys):
    dashboard(study, {"class_path": "expertdiff.loggers.JsonLines", "init_args": {}})
    dashboard(study, False)
    assert capsys.readouterr().out == ""
    assert not (study / "summary").exists()
