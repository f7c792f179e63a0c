"""Folders of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from expertdiff.data import ImageFolder


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
    means = images.float().mean(dim=(2, 3))
    cats, dogs = (sorted(means[labels == label].tolist()) for label in (0, 1))
    assert cats == [[77, 77, 77], [255, 0, 0]]
    assert dogs[0] == pytest.approx([0, 0, 255], abs=4)  # JPEG
    assert dogs[1] == [0x80] * 3
    images, labels = data.split("validation")
    assert images[0, :, 3, 3].tolist() == [1, 2, 3] and labels.tolist() == [1]
    (zoo / "val").rename(zoo / "validation")
    assert len(ImageFolder(zoo, 8).split("validation")[0]) == 1


def test_grey_is_luma(zoo):
    images, _ = ImageFolder(zoo, image_size=8, channels=1).split("train")
    assert images.shape == (4, 1, 8, 8)
    assert {round(0.299 * 255), 77} < set(images[:, 0, 4, 4].tolist())  # ITU-R 601


def test_the_first_pictures_are_of_all_classes(tmp_path):
    for i in range(90):
        folder = "val" if i % 3 else "train"
        picture(tmp_path / folder / "abc"[i // 30] / f"{i}.png", flat_colour((i, i, i), 2, 2))
    data = ImageFolder(tmp_path, 2)
    images, labels = data.split("validation")
    values = images[:, 0, 0, 0].long()
    assert torch.equal(labels, values // 30)
    assert sorted(values.tolist()) == [i for i in range(90) if i % 3]
    assert 2 <= min(labels[:20].bincount(minlength=3))  # 6.7 on average
    again = ImageFolder(tmp_path, 2).split("validation")
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)


def test_the_middle_is_cut_out_and_downscaling_averages(tmp_path):
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = np.arange(1, 5, dtype=np.uint8)[None, :, None] * 50
    picture(tmp_path / "train/wide.png", stripes)
    picture(tmp_path / "train/tall.png", stripes.transpose(1, 0, 2))
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    picture(tmp_path / "val/checks.png", checks.astype(np.uint8))
    (one, other), _ = ImageFolder(tmp_path, 4).split("train")
    assert torch.equal(one, other.transpose(1, 2))
    assert any(np.array_equal(x.permute(1, 2, 0), stripes[:, 4:8]) for x in (one, other))
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
