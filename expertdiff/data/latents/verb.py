"""The verb that encodes pictures once, so that a latent model trains without its autoencoder."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from expertdiff.data.base import Split, permutation
from expertdiff.data.folder import ImageFolder, upright
from expertdiff.data.images import Images
from expertdiff.data.latents.encoders import Autoencoder
from expertdiff.data.latents.store import Block, Store, sha256
from expertdiff.devices import default_device
from expertdiff.files import locked

BLOCK = 1024
"""Pictures that are finished at a time, by one process; what a kill costs."""

KEPT = 50_000
"""Pictures kept of each split, as many as an FID is customarily of."""


def latents(
    images: Images | Path,
    output: Path,
    autoencoder: Autoencoder,
    image_size: int = 256,
    batch_size: int = 32,
    half: bool = True,
) -> None:
    """Encode pictures once, so that a latent model trains without its autoencoder.

    Run it again to go on where it stopped. Under torchrun each process does its share.

    Args:
        images: a folder as ``ImageFolder`` takes it, such as ImageNet's with ``train`` and ``val``,
            or a data set, as CIFAR10.
        output: the folder of the latents.
        autoencoder: ``DiffusersKL`` or ``Tiny``, and its path.
        image_size: height and width of the pictures when they are encoded: halved while they are
            at least twice as large, resized (bicubic), and the middle cut out, as ADM does.
        batch_size: pictures encoded at a time.
        half: keep the latents in 16 bits, not 32.
    """
    output = Path(output)
    if image_size < 1 or batch_size < 1:
        raise ValueError(f"image_size {image_size} and batch_size {batch_size} must be at least 1")
    data = images if isinstance(images, Images) else ImageFolder(images, image_size)
    splits = {name: Pictures.of(data, name) for name in get_args(Split)}
    device, rank, world_size = placed()
    facts = {
        "format": 1,
        "autoencoder": autoencoder.description,
        "scale": {
            "factor": autoencoder.scale,
            "shift": autoencoder.shift,
            "autoencoder": autoencoder.identity,
        },
        "shape": latent_shape(autoencoder, image_size, device),
        "dtype": "float16" if half else "float32",
        "image_size": image_size,
        "num_classes": data.num_classes,
        "class_names": data.class_names and list(data.class_names),
        "splits": {name: pictures.facts() for name, pictures in splits.items()},
        "block": BLOCK,
        "kept": KEPT,
    }
    store = Store.planned(output, facts, {name: p.labels for name, p in splits.items()})
    with locked(output / "blocks" / f"rank-{rank}"):
        mine = store.share(rank, world_size)
        total = sum(block.stop - block.start for block in mine)
        with tqdm(total=total, desc="encoding", unit=" images", disable=rank > 0) as bar:
            for block, batch in cut(splits, mine, image_size):
                batches = torch.from_numpy(batch).split(batch_size)
                moments = encoded(autoencoder, batches, device, bar)
                store.write(block, kept_in(moments, facts["dtype"]), batch[: store.kept(block)])
    if store.finish():
        counts = [f"{len(pictures.labels):,} for {name}" for name, pictures in splits.items()]
        print(f"latents: {output} ({', '.join(counts)})")
    else:
        print(f"rank {rank} is done; the last of the others finishes {output}")


@dataclass(frozen=True)
class Pictures:
    """The pictures of a split, in the order of the store.

    Attributes:
        labels: [N], int64.
        digest: of what they are.
        read: one of them, by its place.
    """

    labels: np.ndarray
    digest: str
    read: Callable[[int], Image.Image]

    @classmethod
    def of(cls, data: Images, name: Split) -> "Pictures":
        """Those of a data set: the files of a folder one by one, as all may not fit into memory."""
        if not isinstance(data, ImageFolder):
            items, labels = data.split(name)
            return cls(
                labels.numpy(),
                sha256(items.numpy()),
                lambda i: to_pil_image(items[i]).convert("RGB"),
            )
        found = data.pictures[name]
        ordered = [found[i] for i in permutation(len(found), "folder")]
        labels = np.array([data.label_of(picture) for picture in ordered], np.int64)
        # Not the pixels, which would be read twice: a picture that changed nearly always has
        # another length.
        known = [[p.relative_to(data.root).as_posix(), p.stat().st_size] for p, _ in ordered]
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        return cls(labels, digest, lambda i: upright(ordered[i][0], 3))

    def facts(self) -> dict[str, Any]:
        """By which a store is told from another."""
        return {
            "n": len(self.labels),
            "labels": sha256(self.labels),
            "pictures": self.digest,
        }


def placed() -> tuple[torch.device, int, int]:
    """Where this process computes, its rank and how many there are, as torchrun says."""
    rank, world_size, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
    return device, rank, world_size


def latent_shape(autoencoder: Autoencoder, image_size: int, device: torch.device) -> list[int]:
    """[C, h, w] of the latents.

    Raises:
        ValueError: pictures of this size do not come back from the autoencoder.
    """
    picture = torch.zeros(1, 3, image_size, image_size, device=device)
    try:
        with torch.inference_mode():
            mean, _ = autoencoder.moments(picture)
            back = autoencoder.decode(mean).shape[1:]
    except RuntimeError as error:
        back = str(error).partition("\n")[0]
    if back != picture.shape[1:]:
        raise ValueError(
            f"pictures of image_size {image_size} do not come back from the autoencoder ({back}): "
            "give a multiple of 8, or of its own factor"
        )
    return list(mean.shape[1:])


def cut(
    splits: Mapping[str, Pictures], blocks: Iterable[Block], size: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Each block, and its pictures uint8 [N, 3, size, size]; the next is cut meanwhile."""
    with ThreadPoolExecutor() as pool:
        begun: deque[tuple[Block, Iterator[np.ndarray]]] = deque()
        for block in blocks:
            read = splits[block.split].read
            pictures = pool.map(
                lambda i, r=read: centre_crop(r(i), size), range(block.start, block.stop)
            )
            begun.append((block, pictures))
            if len(begun) > 1:
                before, pictures = begun.popleft()
                yield before, np.stack(list(pictures))
        for block, pictures in begun:
            yield block, np.stack(list(pictures))


@torch.inference_mode()
def encoded(
    autoencoder: Autoencoder, batches: Iterable[Tensor], device: torch.device, bar: tqdm
) -> Tensor:
    """The moments [N, 2, 2, C, h, w], on the CPU, of batches of uint8 images [B, 3, H, W]."""
    parts = []
    for images in batches:
        x = images.to(device).float().div_(127.5).sub_(1)
        moments = torch.stack(autoencoder.moments(torch.cat([x, x.flip(-1)])), dim=1)
        parts.append(moments.unflatten(0, (2, -1)).transpose(0, 1).float().cpu())
        bar.update(len(images))
    return torch.cat(parts)


def kept_in(moments: Tensor, dtype: str) -> np.ndarray:
    """Moments in their type on disk.

    Raises:
        ValueError: it cannot hold them.
    """
    kept = moments.to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise ValueError(
            f"the autoencoder gives values that are not finite in {dtype}: "
            f"{'set half to false' if moments.isfinite().all() else 'name another'}"
        )
    return kept.numpy()


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The middle of a picture as uint8 [3, size, size], as ADM (arXiv 2105.05233) cuts ImageNet.

    Halved by boxes while its shorter side is at least twice `size`, then resized (bicubic) until
    that side is `size`.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)
    factor = size / min(picture.size)
    sides = [round(side * factor) for side in picture.size]
    picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in sides)
    return np.asarray(picture.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
