"""Images as uint8, and the data sets that come as one or a few files."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.datasets.utils import download_and_extract_archive

from expertdiff.data.base import Data, Split, permutation


class Images(Data):
    """Images uint8 [N, C, H, W]; x0 = uint8 / 127.5 - 1, in [-1, 1].

    Args:
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: mirror each training image left to right with probability 1/2.
        image_size: make them smaller, for quick studies: height and width, a divisor of the
            original's; each pixel is the mean of a box. By default the original's.
    """

    def __init__(
        self,
        batch_size: int,
        validation_samples: int,
        reference: Split,
        flip: bool,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference)
        self.flip = flip
        if image_size is not None:
            self.shape = boxed_shape(self.shape, image_size)

    def scaled(self, items: Tensor) -> Tensor:
        return items.float().div_(127.5).sub_(1)

    def augmented(self, items: Tensor, flip: Tensor) -> Tensor:
        return torch.where(flip[:, None, None, None], items.flip(-1), items) if self.flip else items

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"scale": "[-1, 1] = uint8 / 127.5 - 1", "flip": self.flip}


class Digits(Images):
    """Handwritten digits, 8 x 8 grey, inside scikit-learn: 1,297 to train, 500 to validate.

    The grey values 0..16 become uint8 ``(255 v + 8) // 16`` (0 to 0, 8 to 128, 16 to 255). Which
    images validate is drawn once and for all, without regard to their class.

    Args:
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: see `Images`; a mirrored digit is no digit.
    """

    shape = (1, 8, 8)
    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference, flip)

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits  # slow to import

        digits = load_digits()
        order = permutation(len(digits.target), "digits")
        rows = {"train": order[500:], "validation": order[:500]}[name]
        grey = torch.from_numpy((255 * digits.images[rows].astype(np.int64) + 8) // 16)
        return grey.to(torch.uint8)[:, None], torch.from_numpy(digits.target[rows]).long()


class FashionMNIST(Images):
    """Fashion-MNIST (arXiv:1708.07747), 28 x 28 grey: 60,000 to train, 10,000 (its test set) to
    validate.

    Args:
        root: folder that holds, or is to hold, ``FashionMNIST/raw``.
        download: fetch it when it is not there.
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: see `Images`; off, because all shoes point to the left.
        image_size: see `Images`.
    """

    shape = (1, 28, 28)
    num_classes = 10
    class_names = tuple(torchvision.datasets.FashionMNIST.classes)

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference, flip, image_size)
        self.folder, self.download = Path(root).expanduser() / "FashionMNIST", download

    def prepare_data(self) -> None:
        if self.download and not self.folder.is_dir():
            fetch(self.folder, lambda to: torchvision.datasets.FashionMNIST(to, download=True))

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        prefix, n = {"train": ("train", 60000), "validation": ("t10k", 10000)}[name]
        images = self._payload(f"{prefix}-images-idx3-ubyte", 16, (n, *type(self).shape))
        labels = self._payload(f"{prefix}-labels-idx1-ubyte", 8, (n,))
        return boxed(torch.from_numpy(images), self.shape[-1]), torch.from_numpy(labels).long()

    def _payload(self, name: str, header: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = read_bytes(self.folder / "raw" / name)
        if len(raw) != header + np.prod(shape):
            raise damaged(self.folder / "raw" / name, f"{len(raw)} bytes")
        return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


class CIFAR10(Images):
    """CIFAR-10, 32 x 32 colour: 50,000 to train, 10,000 (its test set) to validate.

    Reads the official binary version: 1 byte label and 3,072 bytes [3, 32, 32] a record. Every file
    must be the published one, byte for byte.

    Args:
        root: ``cifar-10-batches-bin``, or the folder that holds, or is to hold, it.
        download: fetch it from its author's site when it is not there.
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: see `Images`.
        image_size: see `Images`.
    """

    shape = (3, 32, 32)
    num_classes = 10
    class_names = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    url_md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    md5: dict[str, dict[str, str]] = {
        "train": {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        "validation": {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
    }

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = True,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference, flip, image_size)
        root = Path(root).expanduser()
        itself = any(root.glob("*_batch*.bin"))
        self.folder = root if itself else root / "cifar-10-batches-bin"
        self.download = download

    def prepare_data(self) -> None:
        if self.download and not self.folder.is_dir():
            archive = dict(url=self.url, md5=self.url_md5)
            fetch(self.folder, lambda to: download_and_extract_archive(download_root=to, **archive))

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        raw = b"".join(self._file(file, md5) for file, md5 in self.md5[name].items())
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
        images = np.ascontiguousarray(records[:, 1:]).reshape(-1, *type(self).shape)
        labels = torch.from_numpy(records[:, 0].astype(np.int64))
        return boxed(torch.from_numpy(images), self.shape[-1]), labels

    def _file(self, name: str, md5: str) -> bytes:
        raw = read_bytes(self.folder / name)
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != md5:
            raise damaged(self.folder / name, f"{len(raw)} bytes, md5 {found}, published: {md5}")
        return raw


def boxed_shape(shape: tuple[int, ...], image_size: int) -> tuple[int, ...]:
    """`shape` with another height and width; raises a ValueError where boxes do not come out."""
    channels, size = shape[0], shape[-1]
    if image_size < 1 or size % image_size:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(f"image_size {image_size} does not divide {size}: choose from {divisors}")
    return (channels, image_size, image_size)


def boxed(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, H] as [N, C, size, size]: the mean of each box of pixels, rounded."""
    if images.shape[-1] == size:
        return images
    parts = [avg_pool2d(part.float(), images.shape[-1] // size) for part in images.split(4096)]
    return torch.cat([part.round_().to(torch.uint8) for part in parts])


def fetch(folder: Path, download: Callable[[str], object]) -> None:
    """Makes `folder` by ``download(temporary)``, which leaves ``temporary / folder.name`` behind.

    Any number of jobs may do so at once: each has its own temporary folder, the first one wins.

    Raises:
        ValueError: it cannot be downloaded.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            download(temporary)
            try:
                os.replace(Path(temporary) / folder.name, folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except (OSError, RuntimeError) as error:  # torchvision's word for a wrong md5 is RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} is not there and cannot be downloaded ({reason}): copy it there, "
            "or set root to where it is"
        ) from error


def read_bytes(path: Path) -> bytes:
    """The bytes of a data file; a ValueError that names it when it is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): set root to where the data are, or remove "
            "what is left of them and set download to true"
        ) from error


def damaged(path: Path, found: str) -> ValueError:
    """The refusal of a file that is not the published one."""
    return ValueError(
        f"{path} is not the published file ({found}): remove its folder to download it again"
    )
