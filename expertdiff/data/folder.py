"""Own pictures."""

import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.contrib.concurrent import thread_map

from expertdiff.data.base import Split, permutation
from expertdiff.data.images import Images
from expertdiff.seeds import seed_of

Picture = tuple[Path, str]
"""A picture file and its class: the subfolder that it lies in, or "" where there is none."""


class ImageFolder(Images):
    """Pictures of a folder, decoded once and kept in memory.

    `root` holds ``train`` and ``validation`` (or ``val``); else it is itself one folder of
    pictures, of which a hash of each picture's name sets `validation_fraction` apart: a picture
    stays on its side when others come or go. In each of these folders the pictures lie in one
    subfolder a class, as torchvision's ImageFolder has it, or all directly in it, without classes.
    Their order is drawn once and for all, without regard to their class.

    Pictures are turned upright (EXIF), 16 bits become 8, transparency is dropped; the shorter side
    is resized to `image_size` (bicubic, antialiased) and the middle cut out. The memory needed is
    ``channels * image_size ** 2`` bytes a picture, in each process and again on its accelerator.

    Args:
        root: the folder.
        image_size: height and width, in pixels.
        channels: 3 for colour, 1 for grey.
        validation_fraction: of a root without ``train``, in (0, 1).
        batch_size: see `Data`.
        validation_samples: see `Data`.
        reference: see `Data`.
        flip: see `Images`; turn it off where left and right matter, as in text.

    Raises:
        ValueError: an argument out of its range. Later: a folder that is missing, empty or mixed, a
            file that cannot be decoded, or pictures that do not fit into memory.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: Literal[1, 3] = 3,
        validation_fraction: float = 0.1,
        batch_size: int = 128,
        validation_samples: int = 1000,
        reference: Split = "validation",
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size, validation_samples, reference, flip)
        if image_size < 1 or channels not in (1, 3):
            raise ValueError(
                f"image_size {image_size} must be positive, channels {channels} 1 or 3"
            )
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction {validation_fraction} must be in (0, 1)")
        self.root, self.validation_fraction = Path(root).expanduser(), validation_fraction
        self.shape = (channels, image_size, image_size)

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        names = sorted({name for _, name in self.pictures["train"]})
        return None if names == [""] else tuple(names)

    @property
    def num_classes(self) -> int | None:
        return self.class_names and len(self.class_names)

    def read(self, name: Split) -> tuple[Tensor, Tensor]:
        found = self.pictures[name]
        pictures = [found[i] for i in permutation(len(found), "folder")]
        labels = torch.tensor([self.label_of(picture) for picture in pictures])
        need = len(pictures) * np.prod(self.shape)
        if need > available_memory():
            raise ValueError(
                f"the {len(pictures)} pictures of {name} in {self.root} need "
                f"{need / 2**30:.1f} GiB of memory and {available_memory() / 2**30:.1f} are free: "
                f"choose an image_size below {self.shape[-1]} or fewer pictures"
            )
        images = np.empty((len(pictures), *self.shape), np.uint8)

        def fill(i: int) -> None:
            images[i] = decode(pictures[i][0], *self.shape[:2])

        quiet = self.trainer is not None and not self.trainer.is_global_zero
        thread_map(fill, range(len(images)), desc=f"decoding {name}", unit=" images", disable=quiet)
        return torch.from_numpy(images), labels

    def label_of(self, picture: Picture) -> int:
        """The label of a picture; raises a ValueError where its class is not known."""
        path, name = picture
        if self.class_names is None and not name:
            return 0
        if name not in (self.class_names or ()):
            raise ValueError(f"{path} is of no class of the training pictures: remove or move it")
        return self.class_names.index(name)

    @cached_property
    def pictures(self) -> dict[Split, list[Picture]]:
        """The pictures of each split."""
        if (self.root / "train").is_dir():
            val = self.root / "val"
            validation = val if val.is_dir() else self.root / "validation"
            return {"train": find(self.root / "train"), "validation": find(validation)}
        parts: dict[Split, list[Picture]] = {"train": [], "validation": []}
        for path, name in find(self.root):
            place = seed_of("validation", path.relative_to(self.root).as_posix()) / 2**63
            parts["validation" if place < self.validation_fraction else "train"].append(
                (path, name)
            )
        for split, pictures in parts.items():
            if not pictures:
                raise ValueError(
                    f"no picture of {self.root} is left for {split}: add pictures, or change "
                    f"validation_fraction {self.validation_fraction}"
                )
        return parts


def find(folder: Path) -> list[Picture]:
    """The pictures of a folder in the order of their names."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise ValueError(f"{folder} is not there or holds no pictures: correct root, or fill it")
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    pictures = [(folder / name, name.rpartition("/")[0].partition("/")[0]) for name in names]
    if len({bool(name) for _, name in pictures}) == 2:
        stray = next(path for path, name in pictures if not name)
        raise ValueError(f"{stray} lies beside folders of classes: move it into one of them")
    return pictures


def decode(path: Path, channels: int, size: int) -> np.ndarray:
    """The picture of a file as uint8 [channels, size, size].

    Raises:
        ValueError: it cannot be decoded.
    """
    image = ImageOps.fit(upright(path, channels), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def upright(path: Path, channels: int) -> Image.Image:
    """The picture of a file in its own size, 8 bits, of 3 channels or 1.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = eight_bits(ImageOps.exif_transpose(file))
            return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot decode {path} ({reason}): repair or remove it") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """`image`, or its 16-bit grey values v as round(v / 257); PIL's own conversion clips at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("it has neither 8 nor 16 bits a value")
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))


def available_memory() -> int:
    """Bytes of memory that are free; no limit on a system that does not tell (it is no Linux)."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return sys.maxsize
    return int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024
