"""The 2015 Inception: torch-fidelity's network, its weights checked and nothing unpickled."""

import io
import textwrap
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def download() -> Path:
    """torch-fidelity's own weights file, where torch.hub keeps it.

    Raises:
        ValueError: it is not there and cannot be downloaded.
    """
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


def load_network(path: Path) -> nn.Module:
    """The Inception of a weights file, folded for inference: on a CPU about 1.5 times as fast.

    Its classifier `fc` is all zeros where the file has none.

    Raises:
        ValueError: the file is damaged, a pickle, or of another network.
    """
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
    # Files made for FID leave out the classifier, which only the Inception Score needs.
    return {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **weights}
