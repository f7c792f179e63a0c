"""DiT (Peebles & Xie, arXiv 2212.09748), with the official project's keys."""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from expertdiff.networks.network import Network

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the published sizes."""


class DiT(Network):
    """A transformer on the patches of an image, modulated by its time and class.

    An official checkpoint of the same options loads with ``strict=True``. A fresh network outputs
    exactly 0. The defaults are DiT-XL/2 for ImageNet-256 latents: 675,129,632 parameters, of which
    294,912 are the frozen `pos_embed`.

    Args:
        image_size: side of the (square) images or latents.
        in_channels: C of the images.
        patch_size: side of a patch; each becomes one token.
        size: of the transformer: a published one, or (depth, width, heads).
        mlp_ratio: width of the hidden layer in a block's MLP, in widths of the block.
        num_classes: labels y in [0, num_classes); ``None`` for an unconditional network.
        label_dropout: share of the labels that training replaces by `null_class`, the label
            num_classes; 0 makes no such label.
        learn_sigma: output 2C channels, the second half for the variance.
        qk_norm: a LayerNorm on the queries and keys of each head, against divergence in low
            precision; not in the official networks.
        checkpointing: recompute blocks in the backward pass: less memory, the same gradients.
        compiled: ``torch.compile`` each block, which keeps the keys.

    Raises:
        ValueError: patches that do not fill the image, no such size, heads that do not divide the
            width, or a share outside [0, 1].
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        size: Literal["S", "B", "L", "XL"] | tuple[int, int, int] = "XL",
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        label_dropout: float = 0.1,
        learn_sigma: bool = True,
        qk_norm: bool = False,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        from timm.models.vision_transformer import PatchEmbed  # slow to import

        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide image_size {image_size}: choose a divisor"
            )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout {label_dropout} must be a share, in [0, 1]")
        depth, width, heads = depth_width_heads(size)
        self.shape = (in_channels, image_size, image_size)
        self.patch_size, self.checkpointing = patch_size, checkpointing
        self.num_classes = num_classes
        if num_classes is not None and label_dropout:
            self.null_class = num_classes

        side = image_size // patch_size
        self.x_embedder = PatchEmbed(
            img_size=image_size, patch_size=patch_size, in_chans=in_channels, embed_dim=width
        )
        self.t_embedder = TimestepEmbedder(width)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, width, label_dropout)
        self.pos_embed = nn.Parameter(sines_and_cosines(width, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)
        self._initialise()
        self.compiled = compiled
        if compiled:
            for block in self.blocks:
                block.compile()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        table = [self.y_embedder.embedding_table] if self.num_classes is not None else []
        for module in [self.t_embedder.mlp[0], self.t_embedder.mlp[2], *table]:
            nn.init.normal_(module.weight, std=0.02)
        modulations = [part.adaLN_modulation[1] for part in [*self.blocks, self.final_layer]]
        for module in [*modulations, self.final_layer.linear]:
            nn.init.zeros_(module.weight)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction [B, C, H, W], or [B, 2C, H, W] with `learn_sigma`.

        Args:
            x_t: noisy images [B, C, H, W].
            t: raw timesteps [B], integer or float.
            y: class labels [B] int64; of a network with `num_classes`, ``None`` is `null_class`.

        Raises:
            ValueError: images of another shape, labels that the network does not have (on a GPU,
                where looking at them would stall it, the kernel fails instead), or none where it
                has no null label.
        """
        if x_t.shape[1:] != self.shape:
            raise ValueError(
                f"the network is made for images of shape {self.shape}, not "
                f"{tuple(x_t.shape[1:])}: set its in_channels and image_size"
            )
        c = self._condition(t, y)  # [B, D]
        x = self.x_embedder(x_t) + self.pos_embed  # [B, tokens, D], float32 under autocast too
        for block in self.blocks:
            if self.checkpointing:
                # With the weights of this moment: a network that mixes them puts others there.
                weights = dict(block.named_parameters())
                x = checkpoint(functional_call, block, weights, (x, c), use_reentrant=False)
            else:
                x = block(x, c)
        return self._unpatchified(self.final_layer(x, c))

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """[B, D]: the embedding of the time, plus the label's where there are classes."""
        c = self.t_embedder(t)
        if self.num_classes is None:
            if y is not None:
                raise ValueError(
                    "num_classes is None, but the call came with labels y: leave them out"
                )
            return c
        if y is None:
            if self.null_class is None:
                raise ValueError(
                    f"the network has num_classes {self.num_classes} and no null label, but the "
                    "call came without labels y: give them, or train with label_dropout above 0"
                )
            y = torch.full(t.shape, self.null_class, device=t.device)
        return c + self.y_embedder(y)

    def _unpatchified(self, x: Tensor) -> Tensor:
        """[B, C, H, W] of [B, tokens, p p C], whose last dimension has the channels innermost."""
        side, p = self.shape[-1] // self.patch_size, self.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def depth_width_heads(size: str | tuple[int, int, int]) -> tuple[int, int, int]:
    """Of a published size or of three numbers; raises a ValueError where they make no network."""
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"size {size!r} must be one of {', '.join(SIZES)}, or depth, width, heads")
    depth, width, heads = SIZES[size] if isinstance(size, str) else size
    if min(depth, width, heads) < 1 or width % 4 or width % heads:
        raise ValueError(
            f"size {[depth, width, heads]} is depth, width and heads: the width must be a multiple "
            "of 4 and of the heads, and none may be 0"
        )
    return depth, width, heads


def sines_and_cosines(width: int, side: int) -> Tensor:
    """Where each patch of a square lies, row by row: float32 [side^2, width].

    The first half encodes the column, the second the row; each is sines, then cosines, at
    frequencies 1e4^(-j / (width/4)).
    """
    frequencies = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1).float()


def in_float32(x: Tensor) -> torch.autocast:
    """A context without autocast, for what costs little and reaches far: time, class, scales."""
    return torch.autocast(x.device.type, enabled=False)


class TimestepEmbedder(nn.Module):
    """t [B] as 128 cosines and 128 sines, then through a small network: [B, D] in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies
        with in_float32(t):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels [B] as vectors [B, D]; training replaces a share by the label `num_classes`."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        last = self.embedding_table.num_embeddings - 1
        if y.device.type == "cpu" and (outside := y[(y < 0) | (y > last)]).numel():
            raise ValueError(
                f"label {outside[0]} must be in [0, {last}]: num_classes says how many"
            )
        if self.training and self.dropout:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: the norm's affine part, given by the condition."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def modulation(width: int, parts: int) -> nn.Sequential:
    """From the condition [B, D] to `parts` vectors of it, as one [B, parts D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """Attention and an MLP, each modulated before it and gated after it (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        from timm.models.vision_transformer import Attention, Mlp  # slow to import

        super().__init__()
        self.attn = Attention(
            dim=width, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm
        )
        self.mlp = Mlp(
            in_features=width,
            hidden_features=int(mlp_ratio * width),
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with in_float32(c):
            parts = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        # x + gate * branch, in one pass over memory.
        x = torch.addcmul(x, gate_a, self.attn(modulated(x, shift_a, scale_a)))
        return torch.addcmul(x, gate_m, self.mlp(modulated(x, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """From tokens [B, tokens, D] to the values of their patches, modulated; in float32."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with in_float32(c):
            shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
            return self.linear(modulated(x, shift, scale))
