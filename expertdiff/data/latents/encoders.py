"""Autoencoders, between images and the latents that a model is trained on."""

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertdiff.describe import Described, describe

PART = 16
"""Latents decoded at a time: an image has a thousand times the memory of its file on the way."""


class Autoencoder(Described, ABC):
    """Between images and latents z, on whatever device these are; x0 = (z - shift) * scale.

    Attributes:
        scale: brings latents to about unit variance.
        shift: their mean.
    """

    scale: float
    shift: float

    @property
    @abstractmethod
    def identity(self) -> str:
        """The SHA-256 of the weights: latents of others mean something else."""

    @property
    def description(self) -> dict[str, Any]:
        """As `describe` makes it, good from any working directory."""
        return describe(self)

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, each [B, C, h, w], of z of images [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of x0 [B, C, h, w]."""


class Pretrained(Autoencoder):
    """An autoencoder of diffusers, as its ``save_pretrained`` or the hub has it; in float32.

    Args:
        path: a folder with ``config.json`` and safetensors weights, or a name on the hub.
        scale: by default that of ``config.json``.
        shift: likewise.

    Raises:
        ValueError: later: diffusers is not installed, the weights are not there or do not fit.
    """

    architecture: str

    def __init__(
        self, path: str | Path, scale: float | None = None, shift: float | None = None
    ) -> None:
        self.path, self._scale, self._shift = path, scale, shift

    @cached_property
    def _model(self) -> nn.Module:
        try:
            import diffusers  # slow to import, and not everybody has it
        except ImportError as error:
            raise ValueError(
                f"{type(self).__name__} needs diffusers: pip install 'expertdiff[latents]'"
            ) from error
        cls, path = getattr(diffusers, self.architecture), str(Path(self.path).expanduser())
        try:
            found = cls.load_config(path).get("_class_name")
            if found != self.architecture:
                raise ValueError(f"it is a {found}")
            model, info = cls.from_pretrained(
                path,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
            if info["missing_keys"]:  # diffusers would make them up
                raise ValueError(f"it has no {info['missing_keys'][0]}")
        except Exception as error:  # of diffusers, the hub, the network or safetensors
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise ValueError(
                f"cannot load {self.path} as {self.architecture} ({reason}): give a folder with "
                "its config.json and diffusion_pytorch_model.safetensors, or, with a network, its "
                "name on huggingface.co"
            ) from error
        return model.eval().requires_grad_(False)

    @property
    def scale(self) -> float:
        return self._model.config.scaling_factor if self._scale is None else self._scale

    @property
    def shift(self) -> float:
        # Older files have no shift, or null.
        return (self._model.config.shift_factor or 0.0) if self._shift is None else self._shift

    @cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            digest.update(weight.cpu().contiguous().numpy())
        return digest.hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        local = Path(self.path).expanduser()
        path = str(local.resolve()) if local.is_dir() else str(self.path)
        return describe(type(self)(path, self.scale, self.shift))

    def decode(self, x0: Tensor) -> Tensor:
        model = self._model.to(x0.device)
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            latents = (x0.float() / self.scale + self.shift).split(PART)
            return torch.cat([model.decode(z).sample for z in latents]).clamp_(-1, 1)


class DiffusersKL(Pretrained):
    """``AutoencoderKL``, the variational autoencoder of Stable Diffusion (arXiv 2112.10752).

    Args:
        path: see `Pretrained`; for example ``stabilityai/sd-vae-ft-ema``.
        scale: see `Pretrained`; 0.18215 of Stable Diffusion 1 and 2.
        shift: see `Pretrained`.
    """

    architecture = "AutoencoderKL"

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self._model.to(images.device).encode(images).latent_dist
        return posterior.mean, posterior.std


class Tiny(Pretrained):
    """``AutoencoderTiny``, such as TAESD: small, fast and without a posterior (deviation 0).

    Args:
        path: see `Pretrained`; for example ``madebyollin/taesd``.
        scale: see `Pretrained`; 1 of TAESD, whose latents are those of Stable Diffusion scaled.
        shift: see `Pretrained`.
    """

    architecture = "AutoencoderTiny"

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self._model.to(images.device).encode(images).latents
        return mean, torch.zeros_like(mean)
