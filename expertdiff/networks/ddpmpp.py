"""DDPM++ (Song et al., arXiv 2011.13456, appendix H), the network of Soft Truncation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertdiff.networks import unet
from expertdiff.networks.network import Network

TINY = 1e-10  # scale of a branch's last layer, which so starts as almost nothing


class DDPMpp(Network):
    """A UNet whose residual blocks also resample; every residual sum is divided by sqrt 2.

    Unconditional. A fresh network outputs about 1e-5. The defaults are Soft Truncation's
    ImageNet-32 network (arXiv 2106.05527): 61,804,419 parameters.

    Args:
        image_size: side of the (square) images in pixels.
        in_channels: C of the images.
        model_channels: the width that `channel_mult` multiplies; even, at least 4.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        channel_mult: width of each level; each but the last halves the resolution.
        attention_resolutions: sides in pixels at which attention follows every residual block on
            the way down, and the last one on the way up. The middle always has attention.
        dropout: probability, inside the residual blocks.

    Raises:
        ValueError: `image_size` cannot be halved often enough, or `model_channels` is odd or
            below 4.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        num_res_blocks: int = 4,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        halvings = len(channel_mult) - 1
        if image_size % 2**halvings:
            raise ValueError(
                f"image_size {image_size} cannot be halved {halvings} times: "
                f"use a multiple of {2**halvings} or a shorter channel_mult"
            )
        if model_channels % 2 or model_channels < 4:
            raise ValueError(
                f"model_channels {model_channels} cannot be half sines and half cosines of the "
                "time, at least 2 of each: use an even number of at least 4"
            )

        half, emb_channels = model_channels // 2, 4 * model_channels
        steps = torch.arange(half, dtype=torch.float64) / (half - 1)
        frequencies = torch.exp(-math.log(10_000) * steps).float()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_embed = nn.Sequential(
            fan_avg(nn.Linear(model_channels, emb_channels)),
            nn.SiLU(),
            fan_avg(nn.Linear(emb_channels, emb_channels)),
            nn.SiLU(),
        )

        def res(width: int, out: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(width, out, emb_channels, dropout, resample)

        widths = [mult * model_channels for mult in channel_mult]
        sides = [image_size // 2**i for i in range(len(widths))]
        width = widths[0]
        self.input_blocks = nn.ModuleList(
            [nn.Sequential(fan_avg(unet.conv3x3(in_channels, width)))]
        )
        skips = [width]
        for out, side in zip(widths, sides):
            if side < image_size:
                self.input_blocks.append(nn.Sequential(res(width, width, nn.AvgPool2d(2))))
                skips.append(width)
            for _ in range(num_res_blocks):
                attend = [Attention(out)] if side in attention_resolutions else []
                self.input_blocks.append(nn.Sequential(res(width, out), *attend))
                skips.append(width := out)

        self.middle_block = nn.Sequential(res(width, width), Attention(width), res(width, width))

        self.output_blocks = nn.ModuleList()
        for out, side in zip(reversed(widths), reversed(sides)):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(nn.Sequential(res(width + skips.pop(), out)))
                width = out
            if side in attention_resolutions:
                self.output_blocks[-1].append(Attention(width))
            if side < image_size:
                self.output_blocks[-1].append(res(width, width, nn.Upsample(scale_factor=2)))

        self.out = nn.Sequential(
            GroupNorm(width), nn.SiLU(), fan_avg(unet.conv3x3(width, in_channels), TINY)
        )

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction [B, C, H, W].

        Args:
            x_t: noisy images [B, C, H, W].
            t: the numbers [B] to embed, integer or float, in [0, 1000): 999 times the time of a
                continuous process.
            y: never looked at.
        """
        angles = t[:, None].float() * self.frequencies
        emb = self.time_embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        h, skips = x_t, []
        for blocks in self.input_blocks:
            h = run(blocks, h, emb)
            skips.append(h)
        h = run(self.middle_block, h, emb)
        for blocks in self.output_blocks:
            h = run(blocks, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


def run(blocks: nn.Sequential, h: Tensor, emb: Tensor) -> Tensor:
    """One block after another; residual ones also get the embedding of the time."""
    for block in blocks:
        h = block(h, emb) if isinstance(block, ResBlock) else block(h)
    return h


class ResBlock(nn.Module):
    """``(shortcut(x) + convs(x)) / sqrt 2``, the embedding added between the two convolutions.

    `resample` (parameter-free) changes the resolution of both branches, before the first conv.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = GroupNorm(channels)
        self.conv1 = fan_avg(unet.conv3x3(channels, out_channels))
        self.emb = fan_avg(nn.Linear(emb_channels, out_channels))
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = fan_avg(unet.conv3x3(out_channels, out_channels), TINY)
        same = channels == out_channels and resample is None
        self.shortcut = nn.Identity() if same else fan_avg(nn.Conv2d(channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.shortcut(self.resample(x)) + h) / math.sqrt(2)


class Attention(nn.Module):
    """``(x + attention(x)) / sqrt 2`` over the pixels, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v = (
            fan_avg(nn.Linear(channels, channels), scale=0.1) for _ in range(3)
        )
        self.out = fan_avg(nn.Linear(channels, channels), TINY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(F.scaled_dot_product_attention(*self.queries_keys_values(x)).squeeze(1))
        return (x + h.transpose(1, 2).unflatten(2, x.shape[2:])) / math.sqrt(2)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attends to what, each [B, 1, H*W, C]."""
        # Pixels as rows, so that linear maps do: of channels_last, only views.
        rows = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        return self.q(rows), self.k(rows), self.v(rows)


class GroupNorm(unet.GroupNorm):
    """min(C/4, 32) groups, or the next fewer that divide the C channels; eps 1e-6."""

    def __init__(self, channels: int) -> None:
        most = min(channels // 4, 32)
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        nn.GroupNorm.__init__(self, groups, channels, eps=1e-6)  # ADM counts its groups otherwise


def fan_avg(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """`layer` with uniform weights of variance 2 scale / (fan_in + fan_out), and biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer
