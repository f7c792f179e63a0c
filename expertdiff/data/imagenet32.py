"""ImageNet at 32 x 32 pixels: two data sets of one name."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from expertdiff.data.base import Split
from expertdiff.data.folder import upright
from expertdiff.data.images import Images
from expertdiff.files import replacing

Version = Literal["chrabaszcz", "pixelrnn"]

COUNTS: dict[str, dict[str, int]] = {
    "chrabaszcz": {"train": 1_281_167, "validation": 50_000},
    "pixelrnn": {"train": 1_281_149, "validation": 49_999},
}
"""Images of each version and split, as published."""
NPZ = {
    "train": [f"train_data_batch_{i}.npz" for i in range(1, 11)],
    "validation": ["val_data.npz"],
}
FOLDERS = {"train": "train_32x32", "validation": "valid_32x32"}
BLOCK = 4096
"""Pictures in memory at a time while a folder is packed."""


class ImageNet32(Images):
    """ImageNet, 32 x 32 colour, in one of the two versions that bear this name.

    They were downscaled differently and do not hold the same images: numbers of one do not compare
    with numbers of the other. ``chrabaszcz`` (arXiv 1707.08819) has 1,281,167 images to train and
    50,000 to validate, with labels (in its authors' order), in ``.npz`` files. ``pixelrnn`` (arXiv
    1601.06759) has 1,281,149 and 49,999, without labels, in two folders of PNG files, each of which
    is decoded once into an ``.npy`` file beside it; the PNG files may be removed then.

    The images are 3.9 GB. Each process loads them from ``.npz``, or shares the ``.npy`` (mapped
    into memory) with the others; an accelerator holds them once more.

    Args:
        version: without a default, because no result means anything without it.
        root: where ``train_data_batch_1.npz`` to ``_10.npz`` and ``val_data.npz`` are, or
            ``train_32x32`` and ``valid_32x32``: directly in it, or one folder further down.
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: see `Images`.

    Raises:
        ValueError: no such version. Later: files that are missing, damaged, pickled, of another
            size or not as many as published, or no room for the ``.npy``.
    """

    shape = (3, 32, 32)

    def __init__(
        self,
        version: Version,
        root: str | Path = "data",
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference, flip)
        if version not in COUNTS:
            raise ValueError(f"version {version!r} must be one of {', '.join(COUNTS)}")
        self.version, self.root = version, Path(root).expanduser()
        self.num_classes = 1000 if version == "chrabaszcz" else None

    def prepare_data(self) -> None:
        if self.version == "pixelrnn":
            for name, folder in FOLDERS.items():
                found = self._find(folder)
                if found and not self._find(f"{folder}.npy"):
                    pack(found, COUNTS[self.version][name])

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        count = COUNTS[self.version][name]
        if self.version == "chrabaszcz":
            images, labels = read_npz([self._npz(file) for file in NPZ[name]], count)
        else:
            images, labels = self._packed(FOLDERS[name], count), np.zeros(count, np.int64)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"version": self.version}

    def _find(self, name: str) -> Path | None:
        places = (self.root / name, *sorted(self.root.glob(f"*/{name}")))
        return next((path for path in places if path.exists()), None)

    def _npz(self, name: str) -> Path:
        if path := self._find(name):
            return path
        get = (
            "unpack Imagenet32_train_npz.zip and Imagenet32_val_npz.zip of image-net.org there, "
            "or set root to where they are"
        )
        if pickled := self._find(name.removesuffix(".npz")):
            raise ValueError(
                f"{pickled} is of the pickled download, which can run any program when it is read: "
                f"{get}"
            )
        raise ValueError(f"{self.root} holds no {name} of ImageNet-32 (chrabaszcz): {get}")

    def _packed(self, folder: str, count: int) -> np.ndarray:
        path = self._find(f"{folder}.npy")
        if path is None:
            raise ValueError(
                f"{self.root} holds no {folder} of ImageNet-32 (pixelrnn): unpack {folder}.tar "
                "there (PixelRNN's small ImageNet, once on image-net.org/small), or set root to "
                "where it is"
            )
        try:
            # Copy on write, because torch wants memory that could be written to.
            images = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read {path} ({error}): remove it to make it again") from error
        if images.shape != (count, *self.shape) or images.dtype != np.uint8:
            raise ValueError(
                f"{path} holds {images.dtype} {list(images.shape)} instead of uint8 "
                f"{[count, *self.shape]}: remove it to make it again"
            )
        return images


def read_npz(paths: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 3, 32, 32] and labels int64 [count], from 0 on, of several files."""
    labels = [member(path, "labels") for path in paths]
    ends = np.cumsum([len(of_file) for of_file in labels])
    if ends[-1] != count:
        raise ValueError(
            f"{paths[0].name} and the like in {paths[0].parent} hold {ends[-1]} images, not the "
            f"{count} of chrabaszcz: unpack the archive again"
        )
    # One file at a time into its place: joining them at the end would need the memory twice.
    images = np.empty((count, 3072), np.uint8)
    for path, of_file, rows in zip(paths, labels, np.split(images, ends[:-1])):
        data = member(path, "data")
        if data.dtype != np.uint8 or data.shape != rows.shape:
            raise ValueError(
                f"{path} holds {data.dtype} {list(data.shape)} instead of uint8 "
                f"{list(rows.shape)}: unpack it again from the archive of 32 x 32 pixels"
            )
        if ((of_file < 1) | (of_file > 1000)).any():
            raise ValueError(f"{path} has labels outside 1 to 1000: unpack it again")
        rows[:] = data
    return images.reshape(-1, 3, 32, 32), np.concatenate(labels).astype(np.int64) - 1


def member(path: Path, name: str) -> np.ndarray:
    """An array of an .npz file, never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except Exception as error:  # a damaged file makes zip and numpy raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read {name} of {path} ({reason}): unpack it again from the npz archive"
        ) from error


def pack(folder: Path, count: int) -> None:
    """Decodes the PNG files of `folder`, in the order of their names, into ``<folder>.npy``."""
    paths = sorted(folder.glob("*.png"))
    if len(paths) != count:
        raise ValueError(
            f"{folder} holds {len(paths)} PNG files, not the {count} of pixelrnn: unpack "
            f"{folder.name}.tar again"
        )
    packed = folder.with_name(f"{folder.name}.npy")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *ImageNet32.shape)}
    try:
        # Written block by block: a full disk then is an error, where a memory map would crash.
        with replacing(packed) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            with ThreadPoolExecutor() as pool, tqdm(total=count, desc=f"packing {folder}") as bar:
                for start in range(0, count, BLOCK):
                    block = list(pool.map(pixels, paths[start : start + BLOCK]))
                    file.write(np.stack(block).tobytes())
                    bar.update(len(block))
    except OSError as error:
        forbidden = error.errno in (errno.EACCES, errno.EPERM)
        need = "permission to write" if forbidden else f"{count * 3072 / 2**30:.1f} GiB of room"
        raise ValueError(
            f"cannot write {packed} ({error.strerror}): make sure of {need} there, or copy "
            f"{folder.name} to where you have it"
        ) from error


def pixels(path: Path) -> np.ndarray:
    """The picture of a file as uint8 [3, 32, 32]; a ValueError where it has another size."""
    image = upright(path, 3)
    if image.size != (32, 32):
        raise ValueError(
            f"{path} has {image.width} x {image.height} pixels instead of 32 x 32: unpack "
            f"{path.parent.name}.tar again"
        )
    return np.asarray(image).transpose(2, 0, 1)
