"""Loggers other than W&B, chosen by configuration."""

import csv
import struct

import lightning.fabric.loggers.tensorboard

from expertdiff.loggers import read_metrics


def test_csv_keeps_the_file_of_every_start(fit, tmp_path):
    for steps in (4, 8):
        both = "--trainer.logger=[{class_path: JsonLines}, {class_path: CSV}]"
        assert fit(both, f"--trainer.max_steps={steps}") == 0
    job = tmp_path / "tiny" / "expert-0"
    logged = []
    for start in (0, 1):
        with open(job / "csv" / f"version_{start}" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        logged += [(int(r["step"]), float(r["train/loss"])) for r in rows if r["train/loss"]]
    lines = read_metrics(job / "metrics.jsonl")
    assert logged == [(x["step"], x["train/loss"]) for x in lines if "train/loss" in x]
    assert [step for step, _ in logged] == [2, 4, 6, 8]


def test_tensorboard_shows_numbers_and_pictures(fit, tmp_path):
    assert fit("--trainer.logger=TensorBoard", "--trainer.max_steps=4") == 0
    scalars, pictures = {}, {}
    for path in (tmp_path / "tiny" / "expert-0" / "tensorboard").glob("events.*"):
        for event in events(path):
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures[value.tag] = (event.step, value.image.encoded_image_string[:4])
                elif value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append(event.step)
    assert scalars["train/loss"] == [2, 4] and scalars["val/mse/0"] == [4]
    assert pictures == {"pictures/denoising": (4, b"\x89PNG")}


def events(path):
    """The events of a TensorBoard file: length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_tensorboard_that_is_not_installed_is_said_in_a_sentence(fit, monkeypatch, capsys):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(lightning.fabric.loggers.tensorboard, name, False)
    try:
        code = fit("--trainer.logger=TensorBoard")
    except SystemExit as stopped:  # of the parser
        code = stopped.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install tensorboard" in line


def test_lightning_s_own_take_a_folder(fit, tmp_path):
    folder = tmp_path / "logs"
    options = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"]
    assert fit(*options, "--trainer.max_steps=2") == 0
    assert (folder / "lightning_logs" / "version_0" / "metrics.csv").is_file()
