"""Which items are drawn, what becomes of them, and where they come from."""

import hashlib
import io
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from expertdiff.data import CIFAR10, Digits, FashionMNIST, ImageFolder
from expertdiff.data.base import Batch, Data, Draw, Shuffled, in_order, permutation
from expertdiff.describe import build, describe


def stream(n=10, batch_size=4, seed=0, rank=0, world_size=1, flip=True, start=0):
    return iter(Shuffled(n, batch_size, seed, rank, world_size, flip, lambda: start))


def take(draws, count):
    return [next(draws) for _ in range(count)]


def attach(data, training=True, rank=0, world_size=1, global_step=0, accumulate=1, seed=0):
    """The part of a trainer that the data look at."""
    data.trainer = SimpleNamespace(
        training=training,
        global_rank=rank,
        world_size=world_size,
        is_global_zero=rank == 0,
        global_step=global_step,
        accumulate_grad_batches=accumulate,
        lightning_module=SimpleNamespace(seeds=[seed]),
    )
    return data


# --- the order ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 3), (3, 8), (12, 4)])
def test_each_epoch_holds_each_item_once(n, batch_size, world_size):
    steps = 4 * n
    ranks = [
        [d.index for d in take(stream(n, batch_size, rank=r, world_size=world_size), steps)]
        for r in range(world_size)
    ]
    # [steps, batch, rank], flattened, is the order of the positions g.
    items = torch.stack([torch.stack(batches) for batches in ranks], dim=-1).flatten()
    epochs = items[: len(items) // n * n].view(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    if n > 5:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > len(epochs) * 0.9


def test_two_ranks_share_what_one_rank_would_have():
    alone = take(stream(50, 8), 20)
    pairs = zip(*(take(stream(50, 4, rank=r, world_size=2), 20) for r in (0, 1)))
    for one, (a, b) in zip(alone, pairs):
        assert set(one.index.tolist()) == {*a.index.tolist(), *b.index.tolist()}


def test_a_stream_from_m_is_the_tail_of_the_stream_from_0():
    whole, tail = (
        take(stream(rank=1, world_size=2), 30),
        take(stream(rank=1, world_size=2, start=17), 13),
    )
    for a, b in zip(whole[17:], tail):
        assert torch.equal(a.index, b.index) and torch.equal(a.flip, b.flip)


def test_seed_rank_and_micro_batch_change_what_is_drawn():
    first = take(stream(1000, 64), 2)
    other = next(stream(1000, 64, seed=1))
    rank = next(stream(1000, 64, rank=1, world_size=2))
    assert not torch.equal(first[0].index, other.index)
    for draw in (first[1], other, rank):
        assert not torch.equal(first[0].flip, draw.flip)


def test_flips_are_fair_and_only_on_request():
    flips = torch.cat([draw.flip for draw in take(stream(1000, 100), 100)])
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / 100  # 4 sigma of 10,000 coins
    assert not any(draw.flip.any() for draw in take(stream(flip=False), 20))


def test_permutations_are_uniform_and_fixed_for_ever():
    counts = np.zeros((4, 4))
    for e in range(2000):
        counts[np.arange(4), permutation(4, "test", e)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 3 / 16)
    assert permutation(8, 0, "data", 0).tolist() == [6, 1, 7, 2, 3, 0, 5, 4]


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(stream(), 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("n, batch_size, world_size", [(1000, 128, 1), (1000, 128, 3), (9, 4, 2)])
def test_validation_uses_each_image_once_and_in_order(n, batch_size, world_size):
    ranks = [in_order(n, batch_size, r, world_size) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    for r, draws in enumerate(ranks):
        assert all(0 < len(draw.index) <= batch_size and not draw.flip.any() for draw in draws)
        assert torch.cat([d.index for d in draws]).tolist() == list(range(r, n, world_size))


def test_validation_of_few_images_loses_and_repeats_none():
    for n, batch_size, world_size in [(5, 1, 2), (1, 4, 3), (7, 2, 5)]:
        drawn = [d.index for r in range(world_size) for d in in_order(n, batch_size, r, world_size)]
        assert sorted(torch.cat(drawn).tolist()) == list(range(n))


# --- batches ---


class Twelve(Digits):
    """The first twelve digits, with all that can be switched on."""

    def read(self, name):
        images, labels = super().read(name)
        return images[:12], labels[:12]


def test_batches_equal_a_plain_loop():
    data = attach(Twelve(batch_size=5, flip=True))
    images, labels = data.split("train")
    loader = iter(data.train_dataloader())
    for draw in take(loader, 6):
        batch = data.on_after_batch_transfer(draw, 0)
        assert isinstance(batch, Batch) and torch.equal(batch.index, draw.index)
        for b, i in enumerate(draw.index.tolist()):
            expected = images[i].numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
            expected = expected[:, :, ::-1] if draw.flip[b] else expected
            assert np.array_equal(batch.x0[b].numpy(), expected)
            assert batch.y[b] == labels[i]
    assert batch.x0.dtype == torch.float32 and batch.x0.shape == (5, 1, 8, 8)
    assert batch.y.dtype == torch.int64


def test_every_grey_value_survives_scaling():
    grey = torch.arange(256, dtype=torch.uint8)
    x0 = Digits().scaled(grey)
    assert x0[0] == -1 and x0[255] == 1
    assert torch.equal(((x0 + 1) * 127.5).round().to(torch.uint8), grey)


def test_validation_batches_come_from_the_validation_split():
    data = attach(Digits(batch_size=64, validation_samples=100), training=False)
    images, labels = data.split("validation")
    batches = [data.on_after_batch_transfer(draw, 0) for draw in data.val_dataloader()]
    assert torch.equal(torch.cat([b.x0 for b in batches]), data.scaled(images[:100]))
    assert torch.equal(torch.cat([b.y for b in batches]), labels[:100])
    few = attach(Twelve(batch_size=5, validation_samples=100), training=False)
    assert sum(len(draw.index) for draw in few.val_dataloader()) == 12


def test_items_are_moved_once_and_forgotten_at_the_end():
    data = attach(Digits(batch_size=4))
    draw = Draw(torch.tensor([0, 1], device="meta"), torch.tensor([False, True], device="meta"))
    data.on_after_batch_transfer(draw, 0)
    resident = data._on(draw.index.device, "train")[0]
    batch = data.on_after_batch_transfer(draw, 0)
    assert batch.x0.device.type == "meta" and data._on(draw.index.device, "train")[0] is resident
    data.teardown("fit")
    assert data._on(draw.index.device, "train")[0] is not resident


def test_other_batches_pass():
    indices = torch.arange(3)
    assert Digits().on_after_batch_transfer(indices, 0) is indices


# --- in a trainer ---


class Recorder(pl.LightningModule):
    """Learns one number and keeps what it was given."""

    seeds = [7]

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((batch_idx, batch.index.tolist(), batch.x0.sum().item()))
        return (self.weight - batch.x0.mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def predict_step(self, batch, batch_idx):
        return batch

    def sample_batches(self):
        return [torch.arange(2), torch.arange(2, 5)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, max_steps, **kwargs):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        accumulate_grad_batches=3,
        **quiet,
        **kwargs,
    )


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path, recwarn):
    validate = dict(val_check_interval=6, check_val_every_n_epoch=None)
    whole, first, second = Recorder(), Recorder(), Recorder()
    data = dict(batch_size=100, flip=True, validation_samples=150)
    trainer(tmp_path, 8, **validate).fit(whole, Digits(**data))
    half = trainer(tmp_path, 5, **validate)
    half.fit(first, Digits(**data))
    half.save_checkpoint(tmp_path / "half.ckpt")
    ckpt_path = tmp_path / "half.ckpt"
    trainer(tmp_path, 8, **validate).fit(second, Digits(**data), ckpt_path=ckpt_path)
    assert len(whole.trained) == 24 and len(first.trained) == 15
    assert first.trained + second.trained == whole.trained
    epoch = sum((index for _, index, _ in whole.trained[:13]), [])[:1297]
    assert sorted(epoch) == list(range(1297))

    images, _ = Digits().split("validation")
    sanity, validation = whole.validated[:2], whole.validated[2:4]
    for batches in (sanity, validation):
        assert torch.cat([b.index for b in batches]).tolist() == list(range(150))
        assert torch.equal(torch.cat([b.x0 for b in batches]), Digits().scaled(images[:150]))
    assert not [w for w in recwarn if "workers" in str(w.message) or "__len__" in str(w.message)]


def test_a_second_epoch_goes_on_where_the_first_ended(tmp_path):
    limited, whole = Recorder(), Recorder()
    trainer(tmp_path, 4, limit_train_batches=6, limit_val_batches=0).fit(limited, Digits(50))
    trainer(tmp_path, 4, limit_val_batches=0).fit(whole, Digits(50))
    assert [index for _, index, _ in limited.trained] == [index for _, index, _ in whole.trained]


def test_what_test_and_predict_draw_is_the_modules_to_say(tmp_path):
    recorder = Recorder()
    trainer(tmp_path, 1).test(recorder, Digits())
    predicted = trainer(tmp_path, 1).predict(recorder, Digits())
    for batches in (recorder.tested, predicted):
        assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3, 4]]


# --- any data set ---


def test_identity_is_plain_and_tells_data_apart():
    identity = Digits().identity()
    assert identity == Digits(batch_size=3).identity()
    images, labels = Digits().split("train")
    raw = images.numpy().tobytes() + labels.numpy().astype("<i8").tobytes()
    assert identity == {
        "class_path": "expertdiff.data.images.Digits",
        "shape": [1, 8, 8],
        "n": 1297,
        "digest": hashlib.sha256(raw).hexdigest(),
        "scale": "[-1, 1] = uint8 / 127.5 - 1",
        "flip": False,
    }
    assert Twelve().identity()["digest"] != identity["digest"]


def test_described_data_are_built_again():
    data = CIFAR10(root=Path("somewhere"), flip=False, batch_size=3)
    again = build(describe(data), Data)
    assert isinstance(again, CIFAR10) and describe(again) == describe(data)
    assert (again.flip, again.batch_size, again.folder) == (False, 3, data.folder)


def test_reference_is_the_chosen_split():
    assert Digits().split("reference")[0] is not None
    for name in ("train", "validation"):
        data = Digits(reference=name)
        assert data.split("reference")[0] is data.split(name)[0]
    with pytest.raises(ValueError, match="'test' must be one of train, validation"):
        Digits(reference="test").split("reference")


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"validation_samples": 0}])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        Digits(**arguments)


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


# --- folders of pictures ---


def picture(path, values, mode=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values), mode=None).convert(mode or None).save(path, **kwargs)


def flat_colour(colour, height=8, width=8):
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, len(colour)))


@pytest.fixture
def zoo(tmp_path):
    """Two classes in train and validation, in several sizes and kinds of file."""
    root = tmp_path / "zoo"
    picture(root / "train/cat/a.png", flat_colour((255, 0, 0)))
    picture(root / "train/cat/b.png", np.full((20, 30), 77, np.uint8))  # grey
    picture(root / "train/dog/c.jpg", flat_colour((0, 0, 255), 40, 16), "CMYK", quality=95)
    picture(root / "train/dog/deep/d.png", np.full((9, 8), 0x8080, np.uint16))  # 16 bits
    picture(root / "val/dog/e.png", flat_colour((1, 2, 3)))
    (root / "train/dog/notes.txt").write_text("no picture")
    return root


def test_folders_of_classes(zoo):
    data = ImageFolder(zoo, image_size=8)
    images, labels = data.split("train")
    assert data.shape == (3, 8, 8) and data.class_names == ("cat", "dog") and data.num_classes == 2
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    means = images.float().mean(dim=(2, 3))
    assert means[0].tolist() == [255, 0, 0]
    assert means[1].tolist() == [77, 77, 77]
    assert (means[2] - torch.tensor([0.0, 0.0, 255.0])).abs().max() < 4  # JPEG
    assert means[3].tolist() == [0x80] * 3
    images, labels = data.split("validation")
    assert images[0, :, 3, 3].tolist() == [1, 2, 3] and labels.tolist() == [1]
    (zoo / "val").rename(zoo / "validation")
    assert len(ImageFolder(zoo, 8).split("validation")[0]) == 1


def test_grey_is_luma(zoo):
    images, _ = ImageFolder(zoo, image_size=8, channels=1).split("train")
    assert images.shape == (4, 1, 8, 8)
    assert images[:2, 0, 4, 4].tolist() == [round(0.299 * 255), 77]  # ITU-R 601


def test_the_middle_is_cut_out_and_downscaling_averages(tmp_path):
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = np.arange(1, 5, dtype=np.uint8)[None, :, None] * 50
    picture(tmp_path / "train/wide.png", stripes)
    picture(tmp_path / "train/tall.png", stripes.transpose(1, 0, 2))
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    picture(tmp_path / "val/checks.png", checks.astype(np.uint8))
    (tall, wide), _ = ImageFolder(tmp_path, 4).split("train")
    assert np.array_equal(wide.permute(1, 2, 0), stripes[:, 4:8])
    assert torch.equal(tall, wide.transpose(1, 2))
    grey = ImageFolder(tmp_path, 4).split("validation")[0].float()
    assert (grey - 127.5).abs().max() < 3  # aliasing would leave black and white


def test_pictures_are_turned_upright(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture(tmp_path / "train/a.png", half, exif=exif)
    picture(tmp_path / "val/a.png", half)
    data = ImageFolder(tmp_path, 8)
    assert torch.equal(data.split("train")[0].flip(2), data.split("validation")[0])


def test_sixteen_bits_round_to_the_nearest_eight(tmp_path):
    values = np.array([[0, 128, 129, 0xFFFF], [257, 385, 386, 0xFF7F]], np.uint16).repeat(2, 0)
    picture(tmp_path / "train/a.png", values)
    picture(tmp_path / "val/a.png", values)
    images, _ = ImageFolder(tmp_path, 4, channels=1).split("train")
    assert np.array_equal(images[0, 0], np.round(values / 257))


def test_without_classes_a_hash_of_the_name_sets_pictures_apart(tmp_path):
    for i in range(40):
        picture(tmp_path / f"{i}.png", flat_colour((i, i, i), 2, 2))

    def sides():
        data = ImageFolder(tmp_path, 2, validation_fraction=0.3)
        assert data.num_classes is None and data.class_names is None
        assert not data.split("train")[1].any()
        return [set(data.split(name)[0][:, 0, 0, 0].tolist()) for name in ("train", "validation")]

    train, validation = sides()
    assert train | validation == set(range(40)) and not train & validation
    assert 4 <= len(validation) <= 20  # 12 on average, 3 sigma
    (tmp_path / "7.png").unlink()
    picture(tmp_path / "40.png", flat_colour((40, 40, 40), 2, 2))
    fewer = sides()
    assert fewer[0] - {40} == train - {7} and fewer[1] - {40} == validation - {7}


@pytest.mark.parametrize("content", [b"", b"no picture at all", "half", "float"])
def test_a_file_that_cannot_be_decoded_is_named(zoo, content):
    bad = zoo / "train/cat/bad.tif" if content == "float" else zoo / "train/cat/bad.png"
    if content == "float":
        picture(bad, np.full((8, 8), 0.5, np.float32))
    elif content == "half":
        picture(bad, np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
        bad.write_bytes(bad.read_bytes()[:3000])
    else:
        bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot decode .*{bad.name} .*repair or remove it"):
        ImageFolder(zoo, 8).split("train")


def test_folders_that_make_no_sense(zoo, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not there"):
        ImageFolder(tmp_path / "nowhere", 8).split("train")
    picture(zoo / "val/ox/f.png", flat_colour((1, 2, 3)))
    with pytest.raises(ValueError, match=r"f\.png is of no class of the training pictures"):
        ImageFolder(zoo, 8).split("validation")
    picture(zoo / "train/g.png", flat_colour((1, 2, 3)))
    with pytest.raises(ValueError, match=r"g\.png lies beside folders of classes"):
        ImageFolder(zoo, 8).split("train")
    (zoo / "val").rename(tmp_path / "elsewhere")
    (zoo / "train/g.png").unlink()
    with pytest.raises(ValueError, match=r"validation is not there"):
        ImageFolder(zoo, 8).split("train")
    picture(tmp_path / "one/a.png", flat_colour((1, 2, 3)))
    with pytest.raises(ValueError, match=r"no picture of .*one is left for"):
        ImageFolder(tmp_path / "one", 8).split("train")


def test_too_many_pictures_are_refused_before_decoding(zoo):
    (zoo / "train/cat/bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"5 pictures of train .* need \d+\.\d GiB .* image_size"):
        ImageFolder(zoo, 10_000_000).split("train")


@pytest.mark.parametrize(
    "arguments", [{"image_size": 0}, {"channels": 2}, {"validation_fraction": 1.0}]
)
def test_arguments_out_of_range(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        ImageFolder(tmp_path, **({"image_size": 8} | arguments))


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
