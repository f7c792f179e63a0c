"""What images are compared by: named features, and the honest name of a distance on them."""

import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from expertdiff.evaluation.frechet import Statistics, frechet_distance
from expertdiff.evaluation.judge import Judge, Reference
from expertdiff.files import sha256_of
from expertdiff.image_files import check_images, load_npz

BATCH = 100
"""Images whose features are computed at a time."""

MANY = 200_000
"""Images up to which features stay on the device, 3.3 GB of Inception's, and pairs are compared."""


class FeatureExtractor(Judge, ABC):
    """The Frechet distance on features [B,D] of uint8 images [B,C,H,W], C 1 or 3.

    Attributes:
        metric: the name under which a Frechet distance on these features may be published.
    """

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """The features [B,D] of checked uint8 images."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The features [B,D] of any number B, in full float32 whatever the trainer's precision.

        Raises:
            ValueError: the images are not uint8 [B, 1 or 3, H, W].
        """
        check_images(images)
        # Reported numbers must not depend on the trainer's autocast, or on a card that has TF32.
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            return torch.cat([self.extract(part) for part in images.split(BATCH)])

    @property
    def embedding_name(self) -> str:
        """Of `embedding`, as `identity` is of all features."""
        return self.identity

    def embedding(self, features: Tensor) -> Tensor:
        """Those [N,E] of the features [N,D] by which two single images may be compared."""
        return features

    def features(self, images: Tensor, device: torch.device) -> Tensor:
        """The features [N,D] of images on the CPU, computed on `device`.

        They stay there; those of more than 200,000 images are gathered on the CPU.
        """
        home = device if len(images) <= MANY else torch.device("cpu")
        batches = tqdm(images.split(BATCH), desc="features", leave=False)
        return torch.cat([self(batch.to(device)).to(home) for batch in batches])

    def summary(self, features: Tensor) -> Statistics:
        return Statistics.of(features)

    def real(self, items: Tensor, device: torch.device) -> Statistics:
        return self.summary(self.features(items, device))

    def read(self, path: Path, shape: tuple[int, ...], device: torch.device) -> Reference:
        """A file of real images, an ``.npz`` in ADM's layout, that samples are compared with.

        Args:
            path: the file.
            shape: (C, H, W) of the samples.
            device: where features are computed.

        Raises:
            ValueError: another layout, or images of another shape than the samples'.
        """
        images, _ = load_npz(path)
        check_shape(path, images, shape)
        return Reference(self.real(images, device), named(path), len(images))

    def distances(self, samples: Statistics, reference: Statistics) -> dict[str, float]:
        """Warns of fewer images than the covariance needs."""
        warn_of_few(self.metric, samples, reference)
        return {self.metric: frechet_distance(samples, reference)}


class Pixels(FeatureExtractor):
    """The pixels themselves, in [0, 1]: D = C H W.

    For small images that are not natural (digits, patterns), of which Inception knows nothing. The
    distance is FD-pixels, never FID; its cost grows with D^3.
    """

    metric = "FD-pixels"
    identity = "pixels, 0 to 1"

    def extract(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


def warn_of_few(metric: str, samples: Statistics, reference: Statistics) -> None:
    """Warns of fewer than D + 1 images, of which a covariance of D features is singular."""
    fewest = len(samples.mean) + 1
    if min(samples.count, reference.count or samples.count) < fewest:
        against = "statistics" if reference.count is None else f"{reference.count} images"
        warnings.warn(
            f"{metric} of {samples.count} samples against {against}: below {fewest} images the "
            "covariance is singular, and the number says more about their count than about them; "
            "compare it with equal counts only, or draw more samples",
            stacklevel=1,  # one place for all calls: said once
        )


def named(path: Path) -> str:
    """A file by its name and the beginning of its SHA-256, by which results tell it from others."""
    return f"{path.name}, sha256 {sha256_of(path)[:12]}"


def check_shape(path: Path, images: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless the `images` of a reference file are of the samples' shape."""
    if images.shape[1:] != torch.Size(shape):
        raise ValueError(
            f"{path} holds images of {list(images.shape[1:])} and the samples are {list(shape)}: "
            "resizing would change every distance, so give a reference of the samples' resolution"
        )
