"""Images as uint8, and the data sets that come as one or a few files."""

import hashlib
import io
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from expertdiff.data import CIFAR10, Digits, FashionMNIST


def test_every_grey_value_survives_scaling():
    grey = torch.arange(256, dtype=torch.uint8)
    x0 = Digits().scaled(grey)
    assert x0[0] == -1 and x0[255] == 1
    assert torch.equal(((x0 + 1) * 127.5).round().to(torch.uint8), grey)


# --- digits ---


def test_digits_are_scikit_learns():
    data, source = Digits(), load_digits()
    train, validation = data.split("train"), data.split("validation")
    assert train[0].shape == (1297, 1, 8, 8) and validation[0].shape == (500, 1, 8, 8)
    assert train[0].dtype == torch.uint8 and train[1].dtype == torch.int64
    images, labels = (torch.cat(pair).numpy() for pair in zip(train, validation))
    # The rule rounds 255 v / 16, halves upwards.
    grey = np.floor(source.images * 255 / 16 + 0.5).astype(np.uint8)
    ours = sorted((label, image.tobytes()) for label, image in zip(labels, images))
    assert ours == sorted((label, image.tobytes()) for label, image in zip(source.target, grey))
    assert np.bincount(validation[1]).min() > 30  # every class validates
    assert images.min() == 0 and images.max() == 255 and data.num_classes == 10


# --- CIFAR-10 ---

NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Six small files in the official layout, known by their md5: folder, labels, images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (6, 4), dtype=np.uint8)
    images = rng.integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    md5 = {}
    for name, ys, xs in zip(NAMES, labels, images):
        raw = b"".join(bytes([y]) + x.tobytes() for y, x in zip(ys, xs))
        (folder / name).write_bytes(raw)
        md5[name] = hashlib.md5(raw).hexdigest()
    test = {"test_batch.bin": md5.pop("test_batch.bin")}
    monkeypatch.setattr(CIFAR10, "md5", {"train": md5, "validation": test})
    return folder, labels, images


def test_cifar10_reads_the_binary_version(cifar):
    folder, labels, images = cifar
    for root in (folder, folder.parent):
        data = CIFAR10(root, download=False)
        x, y = data.split("train")
        assert x.is_contiguous() and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert np.array_equal(x, images[:5].reshape(20, 3, 32, 32))
        assert np.array_equal(y, labels[:5].reshape(20))
        assert np.array_equal(data.split("validation")[0], images[5])
        assert np.array_equal(data.split("reference")[1], labels[5])


def test_smaller_images_are_means_of_boxes(cifar):
    folder, _, images = cifar
    data = CIFAR10(folder, download=False, image_size=8)
    boxes = images[:5].reshape(20, 3, 8, 4, 8, 4).mean((3, 5))
    assert data.shape == (3, 8, 8)
    np.testing.assert_allclose(data.split("train")[0], boxes, atol=0.5)
    with pytest.raises(
        ValueError, match="image_size 5 does not divide 32: choose from .1, 2, 4, 8"
    ):
        CIFAR10(folder, image_size=5)


def test_cifar10_names_the_file_at_fault(cifar):
    folder, _, _ = cifar
    file = folder / "data_batch_3.bin"
    raw = file.read_bytes()
    for damaged in (raw[:-1], raw[:100] + b"\x00\x01" + raw[102:], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data_batch_3\.bin is not the published file"):
            CIFAR10(folder).split("train")
    CIFAR10(folder).split("validation")
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*data_batch_3\.bin .*set root"):
        CIFAR10(folder).split("train")


def test_cifar10_absent_without_download(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*data_batch_1\.bin.*set root"):
        CIFAR10(tmp_path / "nowhere", download=False).split("train")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """The address of a web server, on this machine, of tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_cifar10_is_downloaded_once(cifar, site, tmp_path, monkeypatch):
    folder, _, images = cifar
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(buffer.getvalue())
    monkeypatch.setattr(CIFAR10, "url", f"{site}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "url_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    root = tmp_path / "new"
    CIFAR10(root).prepare_data()
    archive.unlink()
    data = CIFAR10(root)
    data.prepare_data()
    assert np.array_equal(data.split("validation")[0], images[5])
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(site, tmp_path, monkeypatch, there):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    if there:
        archive.write_bytes(b"a captive portal's login page")
    monkeypatch.setattr(CIFAR10, "url", f"{site}/{archive.name}")
    root = tmp_path / "new"
    with pytest.raises(ValueError, match=r"cifar-10-batches-bin is not there and cannot be") as e:
        CIFAR10(root).prepare_data()
    assert "\n" not in str(e.value) and "set root" in str(e.value)
    assert list(root.iterdir()) == []


# --- Fashion-MNIST ---


def sparse(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


def test_fashion_mnist_reads_idx(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    sparse(raw / "t10k-images-idx3-ubyte", 16 + 10000 * 784)
    sparse(raw / "t10k-labels-idx1-ubyte", 8 + 10000)
    with open(raw / "t10k-images-idx3-ubyte", "r+b") as file:
        file.seek(16 + 784 * 9999 + 28 * 2 + 3)
        file.write(b"\x63")
    with open(raw / "t10k-labels-idx1-ubyte", "r+b") as file:
        file.seek(8 + 42)
        file.write(b"\x07")
    images, labels = FashionMNIST(tmp_path).split("validation")
    assert images.shape == (10000, 1, 28, 28) and images.nonzero().tolist() == [[9999, 0, 2, 3]]
    assert images.sum() == 0x63 and labels.nonzero().tolist() == [[42]] and labels[42] == 7
    with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte"):
        FashionMNIST(tmp_path).split("train")
    sparse(raw / "t10k-labels-idx1-ubyte", 9000)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is not .*\(9000 bytes\)"):
        FashionMNIST(tmp_path).split("validation")


def test_fashion_mnist_not_downloadable(site, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [f"{site}/"])
    with pytest.raises(ValueError, match="FashionMNIST is not there and cannot be") as e:
        FashionMNIST(tmp_path / "new").prepare_data()
    assert "\n" not in str(e.value)


# --- the real data, where they are ---


@pytest.fixture
def real(request):
    root = os.environ.get("EXPERTDIFF_DATA")
    if not root or not (Path(root) / request.param).is_dir():
        pytest.skip(f"EXPERTDIFF_DATA names no folder that holds {request.param}")
    return Path(root)


@pytest.mark.parametrize("real", ["cifar-10-batches-bin"], indirect=True)
def test_real_cifar10(real):
    data = CIFAR10(real, download=False)
    images, labels = data.split("train")
    assert images.shape == (50000, 3, 32, 32) and labels.bincount().tolist() == [5000] * 10
    names = [data.class_names[y] for y in labels[:5]]
    assert names == ["frog", "truck", "truck", "deer", "automobile"]
    mean = images.double().mean(dim=(0, 2, 3)) / 255
    # The mean colour that half of the world normalises by.
    assert [round(value, 4) for value in mean.tolist()] == [0.4914, 0.4822, 0.4465]
    assert data.split("validation")[1].bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("real", ["FashionMNIST"], indirect=True)
def test_real_fashion_mnist(real):
    data = FashionMNIST(real, download=False)
    images, labels = data.split("train")
    assert images.shape == (60000, 1, 28, 28) and labels.bincount().tolist() == [6000] * 10
    assert data.class_names[labels[0]] == "Ankle boot"
    mean = images.double().mean().item() / 255
    assert round(mean, 4) == 0.2860  # as published
    assert data.split("validation")[0].shape == (10000, 1, 28, 28)
