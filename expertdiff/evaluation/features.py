"""What images are compared by: named features, and the honest name of a distance on them."""

import hashlib
import io
import os
import textwrap
from abc import ABC, abstractmethod
from functools import cached_property
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from expertdiff.evaluation.frechet import Statistics, cached_statistics, frechet_distance
from expertdiff.evaluation.images import check_images
from expertdiff.evaluation.judge import Judge
from expertdiff.files import sha256_of

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertdiff"
"""Where statistics of real images are kept."""


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
        """The features [B,D], in full float32 whatever the trainer's precision.

        Raises:
            ValueError: the images are not uint8 [B, 1 or 3, H, W].
        """
        check_images(images)
        # Reported numbers must not depend on the trainer's autocast, or on a card that has TF32.
        with (
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            return self.extract(images)

    def summary(self, features: Tensor) -> Statistics:
        return Statistics.of(features)

    def real(self, items: Tensor, device: torch.device) -> Statistics:
        """Of real images, kept on disk: they are the same in every test."""

        def compute() -> Statistics:
            batches = tqdm(items.split(100), desc="reference features", leave=False)
            return self.summary(torch.cat([self(batch.to(device)).cpu() for batch in batches]))

        return cached_statistics(
            CACHE,
            compute,
            data_digest=hashlib.sha256(items.numpy().tobytes()).hexdigest(),
            count=len(items),
            resolution=items.shape[-1],
            extractor=self.identity,
        )

    def distances(self, samples: Statistics, reference: Statistics) -> dict[str, float]:
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


class Inception(FeatureExtractor):
    """pool_3 of the 2015 Inception, D = 2048: torch-fidelity's port with its TF1 bilinear resize.

    The features of ADM's evaluator (Dhariwal and Nichol 2021). Grey images become three equal
    channels. The network is loaded on first use and is no submodule: its weights never enter a
    checkpoint, an average or an optimizer.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-*.pth``, with or without the
            classifier; downloaded when None.

    Raises:
        ValueError: `weights` is no file; on first use: it is not this network's, or the download
            fails.
    """

    metric = "FID"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else Path(weights).expanduser()
        if self.weights is not None and not self.weights.is_file():
            raise ValueError(
                f"weights={weights} is not a file: give torch-fidelity's Inception weights, "
                "or none to download them"
            )

    @property
    def identity(self) -> str:
        _, digest = self._loaded
        return f"inception-v3-compat pool_3, TF1 bilinear to 299, weights sha256 {digest}"

    def extract(self, images: Tensor) -> Tensor:
        network, _ = self._loaded
        (features,) = network.to(images.device)(images.expand(-1, 3, -1, -1))
        return features

    @cached_property
    def _loaded(self) -> tuple[nn.Module, str]:
        path = self.weights or _download()
        return _network(path), sha256_of(path)


def _download() -> Path:
    """torch-fidelity's own file, where torch.hub keeps it."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path))
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"cannot download {URL_INCEPTION_V3} ({error}): fetch {path.name} on a machine "
                "with internet and give its path as Inception's argument weights"
            ) from error
    return path


def _network(path: Path) -> nn.Module:
    """The Inception of a weights file, folded for inference: on a CPU about 1.8 times as fast."""
    from torch_fidelity.feature_extractor_inceptionv3 import (
        BasicConv2d,
        FeatureExtractorInceptionV3,
    )

    # The constructor unpickles the file it is given: it gets our own copy of the checked tensors.
    copy = io.BytesIO()
    torch.save(_checked_weights(path), copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], copy)
    except RuntimeError as error:
        differences = textwrap.shorten(str(error).partition(":")[2], 200)
        raise ValueError(
            f"{path} holds another network than inception-v3-compat: {differences}"
        ) from error
    for block in [module for module in network.modules() if isinstance(module, BasicConv2d)]:
        block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)


def _checked_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's errors have nothing in common
        raise ValueError(
            f"{path} cannot be loaded as plain weights ({type(error).__name__}): it is damaged, or "
            "a pickle, which is never run; fetch torch-fidelity's file again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path} holds no state dict of tensors: give torch-fidelity's file")
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} is not finite; fetch the file again")
    # Files made for FID leave out the classifier, which pool_3 does not see.
    return {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **weights}
