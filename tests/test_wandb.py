"""A real offline W&B run, read back from its file."""

import json
import struct

import pytest
from conftest import TINY

from expertdiff.cli import main


def records(path):
    """The records of a .wandb file: a LevelDB log of protobufs (operations.md, section 4)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b""


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_offline_run_without_an_account(no_account, tmp_path):
    loggers = "--trainer.logger=[{class_path: JsonLines}, {class_path: WandB}]"
    options = [f"--study.root={tmp_path}", "--model.expert=1", loggers]
    assert main(["fit", *TINY, *options]) == 0
    import wandb

    wandb.finish()
    job = tmp_path / "tiny" / "expert-1"
    (path,) = job.glob("wandb/offline-run-*/run-tiny-expert-1-*.wandb")
    seen, history = {}, {}
    for record in records(path):
        seen.setdefault(record.WhichOneof("record_type"), []).append(record)
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            history.setdefault(key, []).append(json.loads(item.value_json))
    (run,) = {(r.run.run_id, r.run.run_group, r.run.job_type) for r in seen["run"]}
    name = f"tiny-expert-1-{(job / 'wandb_id').read_text()}"
    assert run == (name, "tiny", "expert-1")
    names = {key.split("/")[0] if key.startswith("denoising") else key for key in history}
    assert {"train/loss", "train/mse/1", "val/mse/1", "steps_per_second", "denoising"} <= names
    config = {u.key: json.loads(u.value_json) for r in seen["run"] for u in r.run.config.update}
    config |= {
        u.key: json.loads(u.value_json) for r in seen.get("config", ()) for u in r.config.update
    }
    assert config["model"]["init_args"]["expert"] == 1
    assert config["study"]["name"] == "tiny"
