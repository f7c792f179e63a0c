"""ImageNet-32 in both versions, and the shipped experiments on it."""

import errno
import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from expertdiff.bundle import Bundle
from expertdiff.cli import main
from expertdiff.data import ImageNet32, imagenet32
from expertdiff.data.base import Data
from expertdiff.describe import build, describe
from expertdiff.expert_cli import ConfigOnly

CONFIGS = ROOT / "configs/imagenet32"
TWIN = [ROOT / "tests/conf/tiny.yaml", ROOT / "tests/conf/soft_truncation.yaml"]


def counted(monkeypatch, version, train, validation):
    counts = {version: {"train": train, "validation": validation}}
    monkeypatch.setattr(imagenet32, "COUNTS", imagenet32.COUNTS | counts)


@pytest.fixture
def npz(tmp_path, monkeypatch):
    """The eleven files of Chrabaszcz et al. with two to twelve images each, in two folders."""
    counted(monkeypatch, "chrabaszcz", sum(range(3, 13)), 2)
    rng = np.random.default_rng(0)
    sets = {}
    for i in range(11):
        folder, name = ("train_npz", f"train_data_batch_{i}") if i else ("val_npz", "val_data")
        data = rng.integers(0, 256, (i + 2, 3072), dtype=np.uint8)
        labels = rng.integers(1, 1001, i + 2)
        (tmp_path / folder).mkdir(exist_ok=True)
        np.savez(tmp_path / folder / f"{name}.npz", data=data, labels=labels)
        sets[name] = data, labels
    return tmp_path, sets


@pytest.fixture
def png(tmp_path, monkeypatch):
    """The two folders of PixelRNN's version with seven and three pictures [N, H, W, 3]."""
    counted(monkeypatch, "pixelrnn", 7, 3)
    rng = np.random.default_rng(0)
    sets = {}
    for folder, n in (("train_32x32", 7), ("valid_32x32", 3)):
        sets[folder] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        (tmp_path / folder).mkdir()
        for i, picture in enumerate(sets[folder]):
            Image.fromarray(picture).save(tmp_path / folder / f"{i:05}.png")
    return tmp_path, sets


# --- the two versions ---


def test_published_counts():
    assert imagenet32.COUNTS == {
        "chrabaszcz": {"train": 1281167, "validation": 50000},
        "pixelrnn": {"train": 1281149, "validation": 49999},
    }


def test_npz_files_are_joined_in_their_order(npz):
    root, sets = npz
    data = ImageNet32("chrabaszcz", root)
    files = [sets[f"train_data_batch_{i}"] for i in range(1, 11)]
    for split, of_split in {"train": files, "validation": [sets["val_data"]]}.items():
        images, labels = data.split(split)
        raw = np.concatenate([pixels for pixels, _ in of_split])
        assert images.dtype == torch.uint8 and images.shape == (len(raw), 3, 32, 32)
        # Byte c 1024 + h 32 + w of an image is its pixel (h, w) of channel c.
        assert (images[-1, 2, 5, 7] == raw[-1, 2 * 1024 + 5 * 32 + 7]).item()
        assert np.array_equal(images.flatten(1), raw)
        assert labels.dtype == torch.int64
        assert np.array_equal(labels, np.concatenate([ys for _, ys in of_split]) - 1)
    assert data.num_classes == 1000


def test_png_files_are_packed_once(png):
    root, sets = png
    data = ImageNet32("pixelrnn", root)
    for split, folder in {"train": "train_32x32", "validation": "valid_32x32"}.items():
        images, labels = data.split(split)
        assert images.dtype == torch.uint8
        assert np.array_equal(images, sets[folder].transpose(0, 3, 1, 2))
        assert not labels.any() and len(labels) == len(images)
    assert data.num_classes is None
    for picture in root.glob("*/*.png"):
        picture.unlink()
    again = ImageNet32("pixelrnn", root)
    assert torch.equal(again.split("train")[0], data.split("train")[0])
    assert again.identity() == data.identity()


def test_packed_images_are_mapped_and_stay_as_they_are_on_disk(png):
    root, sets = png
    images, _ = ImageNet32("pixelrnn", root).split("train")
    mapped = np.load(root / "train_32x32.npy", mmap_mode="r")
    images.zero_()
    assert np.array_equal(mapped, sets["train_32x32"].transpose(0, 3, 1, 2))


def test_packing_goes_on_over_several_blocks(png, monkeypatch):
    root, sets = png
    monkeypatch.setattr(imagenet32, "BLOCK", 2)
    images, _ = ImageNet32("pixelrnn", root).split("train")
    assert np.array_equal(images, sets["train_32x32"].transpose(0, 3, 1, 2))


def test_the_version_has_no_default(tmp_path, capsys):
    with pytest.raises(TypeError, match="version"):
        ImageNet32(root="data")
    with pytest.raises(ValueError, match="version 'small' must be one of chrabaszcz, pixelrnn"):
        ImageNet32("small")
    path = tmp_path / "config.yaml"
    path.write_text("data: {class_path: ImageNet32, init_args: {root: data}}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / "configs/digits/mdm.yaml"), "--config", str(path)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "version" in error and "required" in error


def test_versions_are_different_data(npz, png):
    root, _ = npz
    ours, theirs = (ImageNet32(version, root).identity() for version in imagenet32.COUNTS)
    assert {ours["version"], theirs["version"]} == {"chrabaszcz", "pixelrnn"}
    assert ours["digest"] != theirs["digest"] and ours["shape"] == theirs["shape"] == [3, 32, 32]


def test_described_and_built_again(tmp_path):
    data = ImageNet32("pixelrnn", tmp_path, batch_size=3, flip=False)
    again = build(describe(data), Data)
    assert isinstance(again, ImageNet32) and describe(again) == describe(data)


# --- what is refused ---


def refused(version, root, split="train") -> str:
    with pytest.raises(ValueError) as error:
        ImageNet32(version, root).split(split)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_absent_files_say_what_to_download(tmp_path):
    message = refused("chrabaszcz", tmp_path / "nowhere")
    assert "nowhere holds no train_data_batch_1.npz" in message
    assert "Imagenet32_train_npz.zip" in message and "set root" in message
    message = refused("pixelrnn", tmp_path / "nowhere", "validation")
    assert "nowhere holds no valid_32x32" in message
    assert "valid_32x32.tar" in message and "set root" in message


def test_the_pickled_download_is_refused_by_name(npz):
    root, _ = npz
    file = root / "train_npz/train_data_batch_3.npz"
    pickled = file.rename(file.with_suffix(""))
    message = refused("chrabaszcz", root)
    assert f"{pickled} is of the pickled download" in message
    assert "Imagenet32_train_npz.zip" in message


def test_a_damaged_npz_is_named(npz):
    root, sets = npz
    file = root / "train_npz/train_data_batch_3.npz"
    whole, (data, labels) = file.read_bytes(), sets["train_data_batch_3"]
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    for content in (b"", whole[:half], flipped, b"\x80\x04K\x01."):
        file.write_bytes(content)
        assert "train_data_batch_3.npz (" in refused("chrabaszcz", root)
    for wrong, name in (
        ({"data": data}, "cannot read labels of"),
        ({"data": data, "labels": labels.astype(object)}, "cannot read labels of"),
        ({"data": data, "labels": labels - 1000}, "labels outside 1 to 1000"),
        ({"data": data.astype(np.int64), "labels": labels}, "int64 [5, 3072] instead of uint8"),
        ({"data": np.tile(data, 4), "labels": labels}, "uint8 [5, 12288] instead of uint8"),
    ):
        np.savez(file, **wrong)
        message = refused("chrabaszcz", root)
        assert name in message and "train_data_batch_3.npz" in message


def test_counts_are_the_published_ones(npz, png, monkeypatch):
    root, _ = npz
    counted(monkeypatch, "chrabaszcz", 76, 2)
    assert "hold 75 images, not the 76 of chrabaszcz" in refused("chrabaszcz", root)
    counted(monkeypatch, "pixelrnn", 8, 3)
    assert "train_32x32 holds 7 PNG files, not the 8 of pixelrnn" in refused("pixelrnn", root)
    assert not list(root.glob("*.npy"))


def test_a_damaged_picture_leaves_nothing_behind(png):
    root, _ = png
    bad = root / "train_32x32/00003.png"
    bad.write_bytes(b"no picture")
    assert f"cannot decode {bad}" in refused("pixelrnn", root)
    Image.new("RGB", (64, 32)).save(bad)
    assert f"{bad} has 64 x 32 pixels instead of 32 x 32" in refused("pixelrnn", root)
    assert {path.name for path in root.iterdir()} == {"train_32x32", "valid_32x32"}


def test_a_packed_file_of_other_content_is_refused(png):
    root, _ = png
    ImageNet32("pixelrnn", root).prepare_data()
    packed = root / "train_32x32.npy"
    packed.write_bytes(packed.read_bytes()[:-100])
    assert f"cannot read {packed}" in refused("pixelrnn", root)
    np.save(packed, np.zeros((6, 3, 32, 32), np.uint8))
    assert "[6, 3, 32, 32] instead of uint8 [7, 3, 32, 32]" in refused("pixelrnn", root)


@pytest.mark.parametrize(
    "code, reason, need",
    [
        (errno.ENOSPC, "No space left on device", "0.0 GiB of room"),
        (errno.EACCES, "Permission denied", "permission to write"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(png, monkeypatch, code, reason, need):
    root, _ = png

    def fail(*_):
        raise OSError(code, reason)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fail)
    message = refused("pixelrnn", root)
    assert f"cannot write {root / 'train_32x32.npy'} ({reason}): make sure of {need}" in message
    assert {path.name for path in root.iterdir()} == {"train_32x32", "valid_32x32"}


# --- the shipped experiments ---


def test_the_experiment_is_the_published_one():
    with torch.device("meta"):  # no need to draw its weights
        cli = ConfigOnly(["--config", str(CONFIGS / "mdm.yaml")])
    assert sum(p.numel() for p in cli.model.network.parameters()) == 61_804_419
    assert cli.model.partition.edges == (0, 0.2, 0.6, 1)
    assert cli.study.budgets(cli.model.partition) == [1_000_000, 2_000_000, 2_000_000]
    visited = cli.model.process.visited(cli.study.evaluation.sampler.steps)
    assert cli.model.partition.index(visited).bincount().tolist() == [10, 20, 20]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(()))], lr=2e-4)
    scheduler, rates = cli.model.lr_scheduler(optimizer), []
    for _ in range(6000):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2e-4 * min(n / 5000, 1) for n in range(1, 6001)])


@pytest.mark.parametrize("name, jobs", [("mdm", 3), ("soft_truncation", 1)])
def test_a_tiny_twin_trains_and_is_tested(tmp_path, name, jobs):
    configs = [part for path in (CONFIGS / f"{name}.yaml", *TWIN) for part in ("--config", path)]
    options = [str(part) for part in configs] + [f"--study.root={tmp_path}"]
    for i in range(jobs):
        expert = [f"--model.expert={i}"] if jobs > 1 else []
        assert main(["fit", *options, *expert]) == 0
    folders = sorted((tmp_path / "tiny").iterdir())
    bundle = Bundle.stitch(folders, tmp_path / "bundle")

    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)

    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    arguments = {"bundle": str(bundle.folder), "evaluation": config["study"]["evaluation"]}
    config["model"] = {"class_path": "expertdiff.methods.stitched.Stitched"}
    config["model"]["init_args"] = arguments | {"output": str(tmp_path / "test")}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["test", "--config", str(path)]) == 0
    result = json.loads((tmp_path / "test" / "metrics.json").read_text())
    # t 1 and 0.667, 0.334, 0.001
    assert result["calls"] == ([1, 1, 2] if jobs > 1 else [4]) and result["nfe"] == 4
    assert all(math.isfinite(value) for value in result["values"])
