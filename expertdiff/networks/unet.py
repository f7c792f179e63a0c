"""The ADM UNet (Dhariwal & Nichol, arXiv 2105.05233), with the official project's keys."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from expertdiff.networks.network import EncoderDecoder


class ADMUNet(EncoderDecoder):
    """The UNet of ADM: residual blocks, attention at some resolutions, skips across the U.

    A checkpoint of guided-diffusion with the same options loads with ``strict=True``. A fresh
    network outputs exactly 0. The defaults are MDM's CIFAR-10 network: 53,010,566 parameters.

    Args:
        image_size: side of the (square) images in pixels.
        in_channels: C of the images.
        model_channels: the width that `channel_mult` multiplies; even.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        channel_mult: width of each level; each but the last halves the resolution.
        attention_resolutions: sides in pixels (not downsampling factors) at which every residual
            block is followed by attention. The middle always has attention.
        num_head_channels: channels of an attention head.
        num_heads: this many heads instead of heads of `num_head_channels` (ADM at 128 pixels: 4).
        dropout: probability, inside the residual blocks.
        learn_sigma: output 2C channels, the second half for the variance.
        use_scale_shift_norm: time and class scale and shift the second norm, instead of adding to
            its input.
        resblock_updown: residual blocks change the resolution, instead of single convolutions.
        use_new_attention_order: channels of qkv lie [q,k,v][head], not [head][q,k,v]. The shapes
            agree, the weights do not: it must be what the checkpoint was trained with.
        num_classes: labels y in [0, num_classes); ``None`` for an unconditional network.
        checkpointing: recompute blocks in the backward pass: less memory, the same gradients.
        decoder_width: what `channel_mult` multiplies in the middle and on the way up, instead of
            `model_channels`.

    Raises:
        ValueError: `image_size` cannot be halved often enough, `model_channels` is odd, or the
            heads do not divide a width with attention.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 128,
        num_res_blocks: int = 3,
        channel_mult: tuple[float, ...] = (1, 2, 2, 2),
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        num_head_channels: int = 32,
        num_heads: int | None = None,
        dropout: float = 0.0,
        learn_sigma: bool = True,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        num_classes: int | None = None,
        checkpointing: bool = False,
        decoder_width: int | None = None,
    ) -> None:
        super().__init__()
        halvings = len(channel_mult) - 1
        if image_size % 2**halvings:
            raise ValueError(
                f"image_size {image_size} cannot be halved {halvings} times: "
                f"use a multiple of {2**halvings} or a shorter channel_mult"
            )
        if model_channels % 2:
            raise ValueError(f"model_channels {model_channels} is odd: use an even number")
        self.num_classes, self.checkpointing = num_classes, checkpointing
        self.decoder_width = model_channels if decoder_width is None else decoder_width

        half, emb_channels = model_channels // 2, 4 * model_channels
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels),
            nn.SiLU(),
            nn.Linear(emb_channels, emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        def res(width: int, out: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(width, out, emb_channels, dropout, use_scale_shift_norm, resample)

        def attention(width: int) -> AttentionBlock:
            if width % (num_heads or num_head_channels):
                split = f"{num_heads=}" if num_heads else f"{num_head_channels=}"
                raise ValueError(f"{split} does not divide {width} channels: choose a divisor")
            heads = num_heads or width // num_head_channels
            return AttentionBlock(width, heads, use_new_attention_order)

        def level(width: int, out: int, side: int) -> nn.Sequential:
            attend = [attention(out)] if side in attention_resolutions else []
            return nn.Sequential(res(width, out), *attend)

        def down(width: int) -> nn.Module:
            return res(width, width, nn.AvgPool2d(2)) if resblock_updown else Downsample(width)

        def up(width: int) -> nn.Module:
            resize = nn.Upsample(scale_factor=2)
            return res(width, width, resize) if resblock_updown else Upsample(width)

        widths = [int(mult * model_channels) for mult in channel_mult]
        sides = [image_size // 2**i for i in range(len(widths))]
        width = widths[0]
        self.input_blocks = nn.ModuleList([nn.Sequential(conv3x3(in_channels, width))])
        skips = [width]
        for out, side in zip(widths, sides):
            if side < image_size:
                self.input_blocks.append(nn.Sequential(down(width)))
                skips.append(width)
            for _ in range(num_res_blocks):
                self.input_blocks.append(level(width, out, side))
                skips.append(width := out)

        widths = [int(mult * self.decoder_width) for mult in channel_mult]
        if min(widths) < 1:
            raise ValueError(f"decoder_width {decoder_width} has no channels: give 1 or more")
        skip, width = width, widths[-1]
        self.middle_block = nn.Sequential(res(skip, width), attention(width), res(width, width))

        self.output_blocks = nn.ModuleList()
        for out, side in zip(reversed(widths), reversed(sides)):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(level(width + skips.pop(), out, side))
                width = out
            if side < image_size:
                self.output_blocks[-1].append(up(width))

        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), zero(conv3x3(width, out_channels)))

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """The embedding [B, D] of time and class, and what crosses the U, finest first.

        Args:
            x_t: noisy images [B, C, H, W].
            t: raw timesteps [B], integer or float.
            y: class labels [B] int64, for a network with `num_classes` only.
        """
        if (y is None) != (self.num_classes is None):
            labels = "without" if y is None else "with"
            raise ValueError(
                f"num_classes is {self.num_classes}, but the call came {labels} labels y: "
                "a network with num_classes needs them, any other takes none"
            )
        angles = t[:, None].float() * self.frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x_t, []
        for blocks in self.input_blocks:
            h = self._run(blocks, h, emb)
            skips.append(h)
        return emb, *skips

    def decode(self, emb: Tensor, *skips: Tensor) -> Tensor:
        """The prediction [B, C, H, W], or [B, 2C, H, W] with `learn_sigma`."""
        h = self._run(self.middle_block, skips[-1], emb)
        for blocks, skip in zip(self.output_blocks, reversed(skips)):
            h = self._run(blocks, torch.cat([h, skip], dim=1), emb)
        return self.out(h)

    def halves(self) -> tuple[list[str], list[str]]:
        names = [name for name, _ in self.named_children()]
        middle = names.index("middle_block")
        return names[:middle], names[middle:]

    def _run(self, blocks: nn.Sequential, h: Tensor, emb: Tensor) -> Tensor:
        for block in blocks:
            inputs = (h, emb) if isinstance(block, ResBlock) else (h,)
            if self.checkpointing and isinstance(block, (ResBlock, AttentionBlock)):
                # With the weights of this moment: a network that mixes them puts others there.
                weights = dict(block.named_parameters())
                h = checkpoint(functional_call, block, weights, inputs, use_reentrant=False)
            else:
                h = block(*inputs)
        return h


class ResBlock(nn.Module):
    """``skip(x) + convs(x)``, the second norm modulated by the embedding of time and class.

    `resample` (parameter-free) changes the resolution of both branches, before the first conv.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), conv3x3(channels, out_channels)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, (2 if scale_shift else 1) * out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero(conv3x3(out_channels, out_channels)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + emb)
        return self.skip_connection(self.resample(x)) + conv(dropout(silu(h)))


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels."""

    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(*self.queries_keys_values(x))
        h = h.transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attends to what, each [B, heads, H*W, channels of a head]."""
        # Pixels as rows, so that linear maps do: of channels_last, only views.
        h = self.norm(x).flatten(2).transpose(1, 2)
        h = F.linear(h, self.qkv.weight.squeeze(2), self.qkv.bias)
        parts = (3, self.num_heads, -1) if self.new_order else (self.num_heads, 3, -1)
        q, k, v = h.unflatten(2, parts).unbind(2 if self.new_order else 3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class GroupNorm(nn.GroupNorm):
    """32 groups where they divide the channels, else as many of 4 or more channels as do."""

    def __init__(self, channels: int) -> None:
        groups = 32
        if channels % 32:
            fits = (g for g in range(1, min(channels // 4, 32) + 1) if channels % g == 0)
            groups = max(fits, default=1)
        super().__init__(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        # Autocast would widen every activation to float32, here and up to the next convolution.
        # The kernels accumulate in float32 whatever the activations are.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def zero(module: nn.Module) -> nn.Module:
    """`module` with all parameters 0, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
