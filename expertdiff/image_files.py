"""Images as bytes: the one way from [-1, 1] to uint8, and the files people and programs read."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from expertdiff.files import replacing

# Below this many pixels a side a person cannot see what a tile shows.
VISIBLE = 32


def check_images(images: Tensor) -> None:
    """Raises a ValueError unless `images` are uint8 [N,C,H,W] with 1 or 3 channels."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images of {images.dtype} {list(images.shape)} given where uint8 [N, 1 or 3, H, W] is "
            "needed: convert [-1, 1] with expertdiff.image_files.to_uint8"
        )


def to_uint8(x: Tensor, rounded: bool = False) -> Tensor:
    """Images in [-1, 1], any shape, as uint8: (x + 1) 127.5, clamped, fraction cut off.

    The rule of ADM's sampler (Dhariwal and Nichol 2021). It is not the exact inverse of
    k / 127.5 - 1, which float32 may put just below k: take real images from their own bytes.
    `rounded` is the rule of DiT's, which decodes latents: to the nearest integer.

    Raises:
        ValueError: a value is not finite.
    """
    if not x.isfinite().all():
        raise ValueError("images hold NaN or infinity: the sampler or its network diverged")
    return ((x.float() + 1) * 127.5 + 0.5 * rounded).clamp(0, 255).to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A PNG of uint8 images [N,C,H,W], row by row; small ones magnified without smoothing.

    Raises:
        ValueError: not uint8 [N, 1 or 3, H, W].
    """
    check_images(images)
    factor = -(-VISIBLE // min(images.shape[-2:]))
    tiles = images.cpu().repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(tiles, nrow=columns).permute(1, 2, 0).contiguous()
    with replacing(path) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, format="PNG")


def save_npz(images: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Samples as ADM's evaluator reads them: `arr_0` uint8 NHWC, `arr_1` int64 labels if any.

    Args:
        images: uint8 [N,C,H,W].
        path: the file, written as named, whole or not at all.
        labels: [N], integers.

    Raises:
        ValueError: not uint8 [N, 1 or 3, H, W], or another number of labels.
    """
    check_images(images)
    arrays = [images.permute(0, 2, 3, 1).cpu().numpy()]
    if labels is not None:
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} given for {len(images)} images")
        arrays.append(labels.cpu().numpy().astype(np.int64))
    # Through an open file: given a name, numpy would append its own suffix.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *arrays)


def load_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """The images, uint8 [N,C,H,W], and labels, int64 [N], of a file in ADM's layout.

    Raises:
        ValueError: unreadable, pickled, without `arr_0`, or of another type or layout.
    """
    return images_of(path, read_arrays(path, ("arr_0", "arr_1")))


def images_of(path: Path, arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """See `load_npz`; of the arrays of its file."""
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
    ):
        found = "no arr_0" if images is None else f"arr_0 {images.dtype} {list(images.shape)}"
        raise ValueError(f"{path} has {found}: ADM's layout is arr_0, uint8 [N, H, W, 1 or 3]")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise ValueError(
            f"{path} has labels arr_1 {labels.dtype} {list(labels.shape)} for {len(images)} images"
        )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return tensor, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those arrays of an ``.npz`` that are there.

    Raises:
        ValueError: unreadable or pickled.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive}
    except Exception as error:  # a broken archive raises whatever its broken part raises
        raise ValueError(f"cannot read {path} as an .npz of arrays: {error}") from error
